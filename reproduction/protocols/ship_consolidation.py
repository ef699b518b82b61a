r"""Makes the folder of a consolidation that ships with the repository, with numbers by which a test checks it.

    python -m reproduction.protocols.ship_consolidation runs/smollm2/p02 artifacts/smollm2-135m --model smollm2 \
        --text stdlib

`documents.json` holds the beginnings of its first four test documents: the loss of both models and the share of far
reads skipped on each, measured on the machine that makes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.auditing import read_corpus
from cramlab.consolidation.documents import test_documents
from cramlab.consolidation.earlier import config_before
from cramlab.consolidation.folder import RECORD, WEIGHTS, load_layers, load_record
from cramlab.consolidation.in_use import FILE
from cramlab.consolidation.measure import mean_loss, measured
from cramlab.files import write_json
from cramlab.hf.loading import Pretrained, load
from cramlab.text import Corpus

FOLDER = Path(__file__).parents[2] / "artifacts" / "smollm2-135m"
DOCUMENTS = "documents.json"
MOST_BYTES = 8_000_000
_N_DOCUMENTS, _N_TOKENS = 4, 512


@torch.no_grad()
def ship(pretrained: Pretrained, corpus: Corpus, folder: Path, out: Path) -> None:
    """Writes `out` from the folder of a consolidation.

    Args:
        pretrained: the model that the folder was made for.
        corpus: the text that it was learned on.
        folder: the folder.
        out: what ships; it may exist.

    Raises:
        ValueError: when the folder was learned on another text, or is too large.
    """
    record = load_record(folder)
    if record["text"] != corpus.described():
        raise ValueError(f"{folder} was learned on {record['text']}, this is {corpus.described()}; give that text")
    out.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, WEIGHTS, FILE):
        shutil.copyfile(folder / name, out / name)
    found = test_documents(pretrained, corpus, config_before(record, folder))[:_N_DOCUMENTS]
    rows = [{"name": name, "text": pretrained.decode(tokens[:_N_TOKENS].tolist())} for name, tokens in found]
    header = {"kind": "documents", "header": records.header(torch.device("cpu"))}
    write_json(out / DOCUMENTS, header | {"documents": [row | beside(pretrained, out, row["text"]) for row in rows]})
    if (n_bytes := sum(path.stat().st_size for path in out.iterdir())) > MOST_BYTES:
        raise ValueError(f"{out} has {n_bytes:,} bytes, more than {MOST_BYTES:,}; lower consolidation.adapter_bytes")


def beside(pretrained: Pretrained, folder: Path, text: str) -> dict[str, Any]:
    """Loss of a text in nats per token, for the original and for the consolidation in `folder`, and what it skips."""
    tokens = torch.tensor(pretrained.encode(text))
    ours = measured(pretrained.model, tokens, load_layers(pretrained.model, folder)[1])
    return {"tokens": len(tokens), "original": mean_loss(pretrained.model, tokens), "consolidated": ours.loss,
            "skipped_frac": ours.skipped_frac}  # fmt: skip


def differing(pretrained: Pretrained, folder: Path, nats: float = 2e-3) -> list[str]:
    """Names of the documents on which a shipped folder is not what it says.

    A token whose score is at the threshold may read on one processor and not on another; so losses may differ by
    `nats`, and shares by as much.
    """
    rows = json.loads((folder / DOCUMENTS).read_text(encoding="utf-8"))["documents"]
    found = [beside(pretrained, folder, row["text"]) for row in rows]
    return [row["name"] for row, now in zip(rows, found, strict=True)
            if any(abs(now[name] - row[name]) > nats for name in now)]  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    """Runs what the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a consolidation")
    parser.add_argument("out", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="text that the folder was learned on")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    ship(load(args.model), read_corpus(args.text), args.folder, args.out)


if __name__ == "__main__":
    main()
