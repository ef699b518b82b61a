"""CRAM on SRCD with change: alarm, reads that reopen, accuracy that comes back, and consolidation of the new values.

    for seed in 5 6 7 8 9; do
        cramlab run srcd/cram --size quick --seed $seed --set training.max_steps=1200 --out runs/drift
    done
    python -m reproduction.protocols.drift_cram runs/drift/cram-seed* --out results/drift

A trained model serves a stream of sequences of the test split, 16 at a time, without labels. After some of them a share
rho of the patterns is rebound. `cramlab.training.reopening` audits, reopens and learns; groups are clusters of the keys
that the router skipped before the change. Three arms: "nothing" never audits; "reopen" reads what is stale and learns
nothing; "learn" also consolidates. Accuracy, attention and reads are counted over blocks of the stream, with the labels
that the model does not see. About five minutes a seed on one core; each seed has a record of its own,
and one that is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cramlab import records
from cramlab.batch import Batch
from cramlab.files import write_json
from cramlab.mixer import Routing
from cramlab.model import ModelOutput, SequenceModel
from cramlab.tasks.changing import ChangingConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training.load import load_run
from cramlab.training.reopening import Reopening, answers, learn, teachable
from cramlab.training.run import RunConfig

Change = Literal["abrupt", "gradual", "recurring"]
# Sequences a batch; batches before and after the change and in a block.
BATCH, BEFORE, AFTER, BLOCK = 16, 60, 400, 10
AUDIT_FRAC, ALPHA, RATE = 0.01, 0.01, 4e-3
STREAMS: tuple[
    tuple[float, Change, str], ...
] = (  # share that is rebound, kind of change and arm of the streams of a seed
    *((rho, "abrupt", "learn") for rho in (0.03, 0.1, 0.3, 1.0)),
    *((0.3, "abrupt", arm) for arm in ("reopen", "nothing")),
    *((0.3, change, "learn") for change in ("gradual", "recurring")),
)
_RADIUS = 0.5  # half the distance of keys of the same pattern is 0.1, of different ones about 0.8


class KeyGroups:
    """Clusters of familiar keys: those of queries that the router skipped; the first of each cluster is its centre."""

    def __init__(self, model: SequenceModel, batches: Sequence[Batch]) -> None:
        centres: list[Tensor] = []
        for batch in batches:
            skipped = batch.retrieval_mask & ~served(model, batch, None).traces[0].attended
            for key in batch.continuous[..., 1:][skipped]:
                if not centres or float(torch.cdist(key[None], torch.stack(centres)).min()) > _RADIUS:
                    centres.append(key)
        self.centres = torch.stack(centres)

    def __len__(self) -> int:
        return len(self.centres)

    def of(self, batch: Batch) -> Tensor:
        """Group of each token, int64 (B, T); -1: its key is in no cluster."""
        distance, nearest = torch.cdist(batch.continuous[..., 1:], self.centres).min(dim=-1)
        return torch.where(distance <= _RADIUS, nearest, -1)


def served(model: SequenceModel, batch: Batch, read: Tensor | None) -> Any:
    """A pass in use, in which some tokens are made to read."""
    with torch.no_grad():
        return model(batch, routing=Routing(audits=read), counterfactual_layer=None if read is None else 0)


class Block:
    """Counts over a block of the stream."""

    def __init__(self) -> None:
        self.right: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.reads = self.tokens = self.optimum = 0

    def add(self, batch: Batch, output: Any) -> None:
        """Adds a batch; "changed" are all queries of rebound patterns, before the change as well."""
        right = output.predictions.logits.argmax(-1) == batch.retrieval_target
        for name in ("changed", "unchanged", "novel"):
            mask = batch.slices[name]
            self.right[name] = self.right.get(name, 0) + int((right & mask).sum())
            self.asked[name] = self.asked.get(name, 0) + int(mask.sum())
        self.reads += int(output.traces[0].scored.sum())
        self.tokens += int(batch.valid.sum())
        self.optimum += int(batch.oracle_reads.sum())

    def row(self) -> dict[str, Any]:
        """Shares."""
        acc = {name: round(self.right[name] / n, 5) if (n := self.asked[name]) else None for name in self.asked}
        return acc | {"attention": round(self.reads / self.tokens, 6), "optimum": round(self.optimum / self.tokens, 6)}


class Stream:
    """One stream with one change: a model in use, its audits and what is counted.

    Args:
        run: config of the trained run.
        model: the trained model; the stream has copies of its own.
        rho: share of patterns that is rebound.
        arm: "nothing", "reopen" or "learn".
        groups: clusters of familiar keys.
        change: kind of change; see `ChangingConfig`.
        rate: learning rate.
    """

    def __init__(
        self, run: RunConfig, model: SequenceModel, rho: float, arm: str, groups: KeyGroups, change: Change, rate: float
    ) -> None:
        self.model, self.before = copy.deepcopy(model), copy.deepcopy(model)
        self.task, self.arm, self.groups = changing(run, rho, change), arm, groups
        self.state = Reopening(len(groups), alpha=ALPHA, audit_frac=AUDIT_FRAC, seed=run.seed)
        self.optimizer = torch.optim.Adam(teachable(self.model), lr=rate)
        self.block, self.blocks, self.reads_of_changed = Block(), [], 0
        self.events: dict[str, int | None] = {"alarm": None, "named": None, "closed": None}
        self.name: dict[str, Any] = {"seed": run.seed, "rho": rho, "change": change, "arm": arm}

    def serve(self, step: int, batch: Batch) -> None:
        """Serves a batch, and counts."""
        output = served(self.model, batch, None) if self.arm == "nothing" else self._audited(batch)
        if step >= BEFORE:
            self.reads_of_changed += int((batch.slices["changed"] & output.traces[0].scored).sum())
        self._note((step + 1 - BEFORE) * BATCH * self.task.seq_len)
        self.block.add(batch, output)
        if (step + 1) % BLOCK == 0:
            state = {"open": int(self.state.open.sum()), "evidence": round(self.state.log_evidence, 3)}
            self.blocks.append(self.block.row() | state | {"reads_of_changed": self.reads_of_changed})
            self.block = Block()

    def _audited(self, batch: Batch) -> ModelOutput:
        """Serves a batch with audits, and learns while a group is open."""
        of = self.groups.of(batch)
        read = self.state.reads(of, batch.retrieval_mask)
        learns = self.arm == "learn" and bool(self.state.open.any())
        output = (learn(self.model, self.before, self.optimizer, batch, read) if learns
                  else served(self.model, batch, read))  # fmt: skip
        was_open = self.state.open.copy()
        self.state.take(of, read, answers(output, read))
        if (was_open & ~self.state.open).any():
            self.before.load_state_dict(self.model.state_dict())
        return output

    def _note(self, tokens: int) -> None:
        """Notes when the first alarm was, the first name, and the first time after it that nothing is open."""
        is_open = bool(self.state.open.any())
        happens = {"alarm": self.state.n_alarms > 0, "named": is_open,
                   "closed": self.events["named"] is not None and not is_open}  # fmt: skip
        for name, now in happens.items():
            if now and self.events[name] is None:
                self.events[name] = tokens

    def row(self) -> dict[str, Any]:
        """What the record holds."""
        columns = {name: [row[name] for row in self.blocks] for name in self.blocks[0]}
        return self.name | {"changed": round(self.name["rho"] * self.task.n_patterns), "groups": len(self.groups),
                            "alarms": self.state.n_alarms, "events": self.events, "blocks": columns}  # fmt: skip


def changing(run: RunConfig, rho: float, change: Change) -> ChangingConfig:
    """The task of a run with a change."""
    assert isinstance(run.task, SRCDConfig)
    plain = {field.name: getattr(run.task, field.name) for field in fields(SRCDConfig)}
    period = AFTER // 2 * BATCH
    return ChangingConfig(**plain, change_at=BEFORE * BATCH, changed_frac=rho, change=change, period=period)


def streams(run: RunConfig, model: SequenceModel, rate: float) -> list[dict[str, Any]]:
    """Rows of a seed; streams go side by side, since they have the same sequences."""
    known = run.task.dataset(seed=run.seed, split="validation", batch_size=BATCH)
    groups = KeyGroups(model, [known.batch(i * BATCH) for i in range(24)])
    found = [Stream(run, model, rho, arm, groups, change, rate) for rho, change, arm in STREAMS]
    for step in range(BEFORE + AFTER):
        drawn: dict[ChangingConfig, Batch] = {}
        for one in found:
            if one.task not in drawn:
                indices = range(step * BATCH, (step + 1) * BATCH)
                drawn[one.task] = one.task.draw(indices, seed=run.seed, split="test")
            one.serve(step, drawn[one.task])
        if (step + 1) % BLOCK == 0:
            print(run.seed, step + 1, [one.blocks[-1]["open"] for one in found], flush=True)
    return [one.row() for one in found]


def main(given: Sequence[str] | None = None) -> int:
    """Writes a record for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of CRAM on SRCD with vector keys")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--rate", type=float, default=RATE, help=f"learning rate (default: {RATE:g})")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    for folder in args.runs:
        run, model = load_run(folder)
        path = args.out / f"cram-seed{run.seed}.json"
        if path.is_file():
            continue
        setting = {"batch": BATCH, "before": BEFORE, "after": AFTER, "block": BLOCK, "audit_frac": AUDIT_FRAC,
                   "alpha": ALPHA, "rate": args.rate, "max_steps": run.training.max_steps,
                   "task": dataclasses.asdict(run.task)}  # fmt: skip
        header = records.header(torch.device("cpu")) | {"kind": "drift of CRAM", "setting": setting}
        write_json(path, header | {"streams": streams(run, model, args.rate)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
