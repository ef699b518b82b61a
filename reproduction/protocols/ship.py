"""Makes the checkpoint in artifacts/ from a run of the arm `ship`: weights in bfloat16, tokenizer, windows, card.

    python -m reproduction.protocols.language runs/language/code --corpus corpora/code --arms ship
    python -m reproduction.protocols.ship runs/language/code --corpus corpora/code

The folder loads with `AutoModelForCausalLM.from_pretrained` after `import cramlab`. Its record holds the loss and the
reads of these very weights on the windows beside them, on a CPU in 32 bits, and a sample.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cramlab import records
from cramlab.files import write_json, write_text
from cramlab.language_model import modeling  # noqa: F401  (registers the model)
from cramlab.language_model.scoring import score
from cramlab.language_model.text import held_out_windows, open_corpus
from reproduction.collect_language import short

FOLDER = Path(__file__).parents[2] / "artifacts" / "cram-code"
RECORD, WINDOWS, CARD = "record.json", "windows.npy", "README.md"
MOST_BYTES = 20_000_000
N_WINDOWS = 4
PROMPT = "def read_lines(path):\n"
SAMPLE_TOKENS = 64


def ship(runs: Path, corpus: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Writes the folder `out` from the run `ship-seedN` in a folder of runs; returns its record.

    Raises:
        FileExistsError: when the folder exists.
        ValueError: when the corpus is not the one of the run, or the folder is too large.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it first")
    trained = records.read_json(runs / f"ship-seed{seed}.json")
    text = open_corpus(corpus)
    if trained["text_sha256"] != text.digest:
        raise ValueError(f"{corpus} is not the text that ship-seed{seed} was trained on; give that one")
    config = trained["config"]
    saved = runs / f"ship-seed{seed}" / f"step-{config['n_steps']:06d}"
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(saved).save_pretrained(out)
    windows = held_out_windows(text, "test", config["context"], N_WINDOWS)
    np.save(out / WINDOWS, windows.numpy().astype(np.uint16))
    header = records.header(torch.device("cpu")) | {"kind": "checkpoint"}
    record = header | {"training": short(trained), "shipped": measured(out)}
    write_json(out / RECORD, record)
    write_text(out / CARD, card(record))
    n_bytes = sum(path.stat().st_size for path in out.iterdir())
    if n_bytes > MOST_BYTES:
        raise ValueError(f"{out} has {n_bytes:,} bytes, more than {MOST_BYTES:,}; train a smaller model")
    return record


def measured(folder: Path) -> dict[str, Any]:
    """Loss and reads of a shipped folder on its windows, and a sample of what it generates, without randomness."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scored = score(model, torch.from_numpy(np.load(folder / WINDOWS).astype(np.int64)), batch_size=1)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    generated = cast("Any", model).generate(prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=0)
    sample = tokenizer.decode(generated[0])
    reads = scored.summary(torch.ones_like(scored.right))
    return {
        "n_parameters": model.num_parameters(),
        "nats_by_window": [round(float(nats), 4) for nats in scored.nats.double().mean(1)],
        "reads_frac": round(reads["reads_frac"], 4),
        "sample": sample,
    }


def card(record: dict[str, Any]) -> str:
    """The card, in Markdown with a header for the hub."""
    trained, shipped = record["training"], record["shipped"]
    config, test = trained["config"], trained["test"]
    layers = ", ".join(map(str, config["cram"]["memory_layers"]))
    loss = sum(shipped["nats_by_window"]) / len(shipped["nats_by_window"])
    recalled = {task: ", ".join(f"{row['accuracy']:.2f} ({next(iter(row.values())):,})" for row in rows)
                for task, rows in trained["recall"].items()}  # fmt: skip
    machine = trained["hardware"]["accelerator"] or trained["hardware"]["processor"]
    return f"""---
license: apache-2.0
library_name: transformers
tags: [cramlab, code]
---

# CRAM language model of code

{shipped["n_parameters"] / 1e6:.1f} million parameters in bfloat16: {config["n_layers"]} layers of width {config["d_model"]} with a gated delta rule, of which layers {layers} (counted from 0)
also read the whole context where a gate expects it to pay. It is a small research model: it writes text that looks
like Python and mostly does not run.

```python
import cramlab
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("artifacts/cram-code")
model = AutoModelForCausalLM.from_pretrained("artifacts/cram-code")
prompt = tokenizer({PROMPT!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={SAMPLE_TOKENS}, do_sample=False)[0]))
```

| what | value |
| --- | --- |
| trained on | {trained["series"][-1]["n_tokens"]:,} tokens of Python's standard library and installed packages (`reproduction/protocols/corpora.py`), {config["n_steps"]:,} steps on {machine}, seed {config["seed"]} |
| loss on test text, as trained | {test["all"]["nats"]:.3f} nats a token; {test["repeated"]["nats"]:.3f} where the trigram stood before in the window, {test["fresh"]["nats"]:.3f} elsewhere |
| reads, as trained | {100 * test["all"]["reads_frac"]:.1f}% of the tokens, mean over layers |
| these weights, on the {len(shipped["nats_by_window"])} windows of `{WINDOWS}` | {loss:.3f} nats a token, {100 * shipped["reads_frac"]:.1f}% reads |
| looked up, accuracy (pairs) | {recalled["lookup"]} |
| copied, accuracy (tokens) | {recalled["copying"]} |
| needle, accuracy (context) | {recalled["needle"]} |

All figures come from `{RECORD}`. What the model generates without randomness:

````text
{shipped["sample"]}
````

Limits: one seed; a vocabulary of {config["vocab_size"]:,} tokens; contexts of {config["context"]:,} tokens in training. The windows are excerpts of the test text
under the licences of their projects. Weights: Apache-2.0.
"""  # noqa: E501


def main(given: Sequence[str] | None = None) -> int:
    """Writes the folder and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by reproduction.protocols.corpora")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args(given)
    print(ship(args.runs, args.corpus, args.out, args.seed)["shipped"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
