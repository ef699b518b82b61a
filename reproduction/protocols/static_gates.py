"""Chooses which layers always read by gates of all layers that are learned together: a static baseline for CRAM.

    python -m reproduction.protocols.static_gates runs/language --corpus corpora/code

Each layer of the arm `all-layers` gets one gate, a number from 0 to 1 that scales its reads. Gates and model learn
together, while a price per open gate rises as long as more gates are open than allowed; that number falls from all
layers to `--layers`. The layers with the largest gates at the end are the static set, which
`reproduction.protocols.language` then trains from its initial weights, as it does with every fixed set. One short run
of about two minutes; a stopped run begins again.

Source: gates of all layers learned together and then discretised as in FlashMorph (arXiv 2606.30562), which freezes the
weights of a trained model and learns from synthetic retrieval; here both learn from the text of the comparison. Hard
concrete gates are those of Louizos et al. 2018 (arXiv 1712.01312).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cramlab import records
from cramlab.config import to_dict
from cramlab.files import write_json
from cramlab.language_model.block import CRAMBlock
from cramlab.language_model.modeling import CRAMForCausalLM
from cramlab.language_model.reading_schedule import ReadingSchedule
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText, open_corpus
from cramlab.language_model.training import start, train_step
from cramlab.memory import CRAMLayer
from reproduction.protocols.language import ARMS, BASE, best_rate, configs

_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution
_LOGIT = 3.0  # at first: a gate is open with probability 0.99
_RATE, _PRICE_RISE = 0.05, 10.0


class StaticGates(nn.Module):
    """One hard concrete gate for each layer of a model, which scales what its layer reads.

    Attributes:
        logit: one per layer, (L,).
        drawn: gates of the present step, (L,).
    """

    def __init__(self, model: CRAMForCausalLM) -> None:
        super().__init__()
        blocks = cast("list[CRAMBlock]", list(model.layers))
        device = next(model.parameters()).device
        self.logit = nn.Parameter(torch.full((len(blocks),), _LOGIT, device=device))
        self.drawn = torch.ones_like(self.logit)
        for i, block in enumerate(blocks):
            cast("CRAMLayer", block.mixer).episodic.w_out.register_forward_hook(self._scaling(i))

    def _scaling(self, layer: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _given, read: read * self.drawn[layer].to(read.dtype)

    def draw(self, seed: int) -> None:
        """Draws the gates of a step."""
        chance = torch.rand(len(self.logit), generator=torch.Generator().manual_seed(seed)).clamp(1e-6, 1 - 1e-6)
        noise = torch.logit(chance).to(self.logit.device)
        soft = torch.sigmoid((self.logit + noise) / _TEMPERATURE)
        self.drawn = (soft * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def chances(self) -> Tensor:
        """Probability that each gate is above 0, (L,)."""
        return torch.sigmoid(self.logit - _TEMPERATURE * math.log(-_LOW / _HIGH))


def learn(config: TextRunConfig, text: PreparedText, n_kept: int) -> dict[str, Any]:
    """Trains a model with its gates; returns `gates`, the probability that each is open, and `layers`, the largest."""
    model, optimizer = start(config)
    gates = StaticGates(cast("CRAMForCausalLM", model))
    gate_optimizer = torch.optim.Adam(gates.parameters(), lr=_RATE)
    price, reading = 0.0, ReadingSchedule()
    for step in range(config.n_steps):
        gates.draw(config.seed * 1_000_003 + step)
        train_step(model, optimizer, text, config, step, reading)
        excess = gates.chances().sum() - allowed(step / config.n_steps, config.n_layers, n_kept)
        (price * excess).backward()  # adds to the gradient of the task's loss
        gate_optimizer.step()
        gate_optimizer.zero_grad()
        price = max(0.0, price + _PRICE_RISE * float(excess.detach()) / (config.n_layers * config.n_steps))
    chances = gates.chances().tolist()
    largest = sorted(range(config.n_layers), key=lambda layer: -chances[layer])[:n_kept]
    return {"gates": [round(chance, 4) for chance in chances], "layers": sorted(largest)}


def allowed(passed: float, n_layers: int, n_kept: int) -> float:
    """Number of open gates that costs nothing after a share of the steps: all in the first third, then fewer."""
    return n_layers - (n_layers - n_kept) * min(1.0, max(0.0, 3 * passed - 1))


def arm_of(layers: Sequence[int]) -> str | None:
    """The arm in which exactly these layers always read, without a window or a table; None: there is none."""
    wanted = {"memory_layers": list(layers), "router": "always"}.items()
    plain = {arm: changes["cram"] for arm, changes in ARMS.items() if set(changes) == {"cram"}}
    return next((arm for arm, fields in plain.items() if fields.items() >= wanted), None)


def main(given: Sequence[str] | None = None) -> int:
    """Writes the record and prints which arm it stands for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by reproduction.protocols.corpora")
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="layers to keep (default: 1)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="field of the run")
    args = parser.parse_args(given)
    base = dataclasses.replace(BASE, device=args.device, seed=args.seed)
    (config,) = configs(base, ["all-layers"], [f"n_steps={args.steps}", *args.set])
    if not 1 <= args.layers <= config.n_layers:
        parser.error(f"--layers {args.layers} must be 1 to n_layers = {config.n_layers}")
    rate = best_rate(args.out / "tuning", "all-layers") or config.learning_rate
    config = dataclasses.replace(config, arm=f"static-gates-{args.layers}", learning_rate=rate)
    path = args.out / f"{config.name}.json"
    if not path.exists():
        torch.set_float32_matmul_precision("high")
        text = open_corpus(args.corpus)
        header = records.header(torch.device(config.device)) | {"kind": "static gates", "config": to_dict(config)}
        write_json(path, header | {"text_sha256": text.digest} | learn(config, text, args.layers))
    record = records.read_json(path)
    arm = arm_of(record["layers"]) or f"none yet: --arms layer-7 --set 'cram.memory_layers={record['layers']}'"
    print(f"gates {record['gates']} keep layers {record['layers']}; arm: {arm}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
