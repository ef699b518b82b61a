"""Times decoding by CRAM language models beside a Llama of equal size, after contexts of growing length.

    python -m benchmarks.language_decode --out language-decode.json
    python -m benchmarks.language_decode --arms llama cram-12 --contexts 1024 8192 --tokens 16

Models are untrained and take the same random tokens, one sequence, with the caches that they make themselves. Gates get
the threshold at which they read their share of the longest context. A row is the time of one token after a context;
"growth" is its ratio to that after the shortest context.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.timing import side_by_side
from cramlab import records
from cramlab.config import overridden, to_dict
from cramlab.files import write_json
from cramlab.language_model.modeling import CRAMForCausalLM
from cramlab.language_model.reading_schedule import quantile_threshold
from cramlab.language_model.run import TextRunConfig
from cramlab.timing import wall_ms
from reproduction.protocols.language import ARMS, BASE


def main(given: list[str] | None = None) -> int:
    """Prints a table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["llama", "layer-7", "cram-12"], choices=ARMS, metavar="ARM")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384], metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens of a timed call (default: 32)")
    parser.add_argument("--repeats", type=int, default=11, metavar="N", help="timed calls of each (default: 11)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="field of TextRunConfig")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args(given)
    device, contexts = torch.device(args.device), sorted(args.contexts)
    base = overridden(dataclasses.replace(BASE, device=args.device, context=contexts[-1] + 4096), args.set)
    tokens = torch.randint(base.vocab_size, (1, contexts[-1]), generator=torch.Generator().manual_seed(0)).to(device)
    configs = {arm: dataclasses.replace(base, arm=arm, **ARMS[arm]) for arm in args.arms}
    models = {arm: prepared(config, tokens) for arm, config in configs.items()}
    rows = []
    for context in contexts:
        works = {arm: decoding(model, tokens[:, :context], args.tokens) for arm, model in models.items()}
        timed = side_by_side(works, repeats=args.repeats, warmups=3, clock=wall_ms(device))
        for arm, way in timed.items():
            one = {name: ms / args.tokens for name, ms in way["ms"].items()}
            rows.append({"arm": arm, "context": context, "ms_per_token": one, "speedup": way["speedup"]})
    shortest = {row["arm"]: row["ms_per_token"]["median"] for row in rows if row["context"] == contexts[0]}
    for row in rows:
        row["growth"] = row["ms_per_token"]["median"] / shortest[row["arm"]]
    result = records.header(device) | {
        "kind": "timings", "n_tokens": args.tokens, "rows": rows,
        "configs": {arm: to_dict(config) for arm, config in configs.items()},
    }  # fmt: skip
    if args.out is not None:
        write_json(args.out, result)
    shown = Table("arm", "context", "ms a token [p10, p90]", "growth", "speed, of the first")
    for row in rows:
        spread = "{median:,.3f} [{p10:,.3f}, {p90:,.3f}]".format(**row["ms_per_token"])
        cells = (f"{row['context']:,}", spread, f"{row['growth']:.2f}", f"{row['speedup']['median']:.2f}")
        shown.add_row(row["arm"], *cells)
    Console(width=120).print(shown)
    return 0


@torch.no_grad()
def prepared(config: TextRunConfig, tokens: Tensor) -> PreTrainedModel:
    """An untrained model in evaluation, whose gates read their share of the tokens (1, T)."""
    model = config.build().to(config.device).eval()  # type: ignore[arg-type]
    if config.reads_frac is not None:
        gated, threshold = cast("CRAMForCausalLM", model), torch.zeros((), device=config.device)
        for _ in range(3):  # what one layer reads changes what the gates above see
            output = gated(input_ids=tokens, use_cache=False, output_gates=True)
            threshold = threshold + quantile_threshold(output.gate_margins, config.n_layers, config.reads_frac)
            gated.set_threshold(threshold)
    return model


@torch.no_grad()
def decoding(model: PreTrainedModel, context: Tensor, n_tokens: int) -> Callable[[], Any]:
    """A call that decodes the next tokens of a sequence; its cache holds the context (1, T) and all tokens since."""
    called = cast("Any", model)
    cache = called(input_ids=context, use_cache=True, logits_to_keep=1).past_key_values
    token = context[:, -1:]

    @torch.no_grad()
    def decode() -> None:
        nonlocal token
        for _ in range(n_tokens):
            output = called(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)

    return decode


if __name__ == "__main__":
    sys.exit(main())
