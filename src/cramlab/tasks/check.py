"""Checks that a task keeps its contract before anything is trained, and its best and trivial scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cramlab.batch import Batch, Predictions
from cramlab.errors import ConfigError
from cramlab.metrics import score
from cramlab.tasks.task import SPLITS, Split, Task

_N_SEQUENCES = 2
_TYPES = {
    "discrete": torch.int64, "continuous": torch.float32, "gaps": torch.float32, "horizons": torch.float32,
    "valid": torch.bool, "dynamics_target": torch.float32, "dynamics_mask": torch.bool,
    "retrieval_target": torch.int64, "retrieval_mask": torch.bool, "oracle_reads": torch.bool,
    "pattern": torch.int64,
}  # fmt: skip


def check_task(task: Task, *, seed: int, splits: tuple[Split, ...] = SPLITS) -> None:
    """Draws two sequences of some splits and compares them with the contract of `Task`.

    Args:
        task: the task's config.
        seed: seed of the data.
        splits: the splits to look at, "train" among them.

    Raises:
        ConfigError: when a part of the task is missing; when shapes, types, ranges or masks of a batch are wrong; when
            the same sequences differ between two calls; or when two splits hold the same sequences.
    """
    name = type(task).__name__
    if missing := [part for part in _parts() if not hasattr(task, part)]:
        raise ConfigError(f"task {name} has no {missing[0]}; see cramlab.tasks.task.Task for what a task needs")
    if not dataclasses.is_dataclass(task) or "seq_len" not in {f.name for f in dataclasses.fields(task)}:
        raise ConfigError(f"task {name}: seq_len is not a field; make it one, as training changes it")
    drawn: dict[Split, Batch] = {}
    for split in splits:
        drawn[split] = task.draw(range(_N_SEQUENCES), seed=seed, split=split)
        if (problem := _problem(task, drawn[split])) is not None:
            raise ConfigError(f'task {name}, split "{split}": {problem}')
    if not _same(drawn["train"], task.draw(range(_N_SEQUENCES), seed=seed, split="train")):
        raise ConfigError(f"task {name}: draw gives other sequences when called again; use no state and no global seed")
    for split in splits:
        if split != "train" and _same(drawn["train"], drawn[split]):
            raise ConfigError(f'task {name}: the splits "train" and "{split}" hold the same sequences; use the split')


def check_own_task(task: Task, *, seed: int) -> None:
    """Applies `check_task` to a task from outside this package, but for its test split, which training leaves alone.

    Raises:
        ConfigError: see `check_task`. The tasks of this package have tests instead.
    """
    if type(task).__module__.partition(".")[0] != __name__.partition(".")[0]:
        check_task(task, seed=seed, splits=("train", "validation"))


def _parts() -> list[str]:
    return [name for name in vars(Task) if not name.startswith("_")]


def _problem(task: Task, batch: Batch) -> str | None:
    """What is wrong with a batch, and the fix; None if nothing is."""
    spec, shape = task.input_spec, (_N_SEQUENCES, task.seq_len)
    channels = {"discrete": (len(spec.vocab_sizes),), "continuous": (spec.n_continuous,)}
    values = {name: getattr(batch, name) for name in _TYPES} | {f"slices[{n!r}]": m for n, m in batch.slices.items()}
    for name, value in values.items():
        kind, wanted = _TYPES.get(name, torch.bool), (*shape, *channels.get(name, ()))
        if not isinstance(value, Tensor) or value.dtype != kind or tuple(value.shape) != wanted:
            given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            return f"batch.{name} is {given}; give {kind} {wanted}"
        if kind == torch.float32 and not bool(value.isfinite().all()):
            return f"batch.{name} is not finite; give numbers, and 0 where a mask is false"
    for name in ("gaps", "horizons"):
        if float(values[name].min()) < 0:
            return f"batch.{name} = {float(values[name].min()):g} is negative; sort the events by time"
    for i, size in enumerate(spec.vocab_sizes):
        low, high = int(batch.discrete[..., i].min()), int(batch.discrete[..., i].max())
        if low < 0 or high >= size:
            return f"batch.discrete[..., {i}] is from {low} to {high}; input_spec allows 0 to {size - 1}"
    answers = batch.retrieval_target[batch.retrieval_mask]
    if len(answers) and (int(answers.min()) < 0 or int(answers.max()) >= spec.n_classes):
        last = spec.n_classes - 1
        return f"batch.retrieval_target is from {int(answers.min())} to {int(answers.max())}; give 0 to {last}"
    if int(batch.pattern.max()) >= task.n_patterns:
        return f"batch.pattern holds {int(batch.pattern.max())}, but n_patterns = {task.n_patterns}"
    for name in ("retrieval_mask", "dynamics_mask", "oracle_reads"):
        if bool((values[name] & ~batch.valid).any()):
            return f"batch.{name} is true on padding; make it false where batch.valid is false"
    if not bool((batch.retrieval_mask | batch.dynamics_mask).any()):
        return "nothing is asked; set retrieval_mask or dynamics_mask"
    return None


def _same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in _TYPES)


def reference_scores(task: Task, *, seed: int, n_sequences: int = 64) -> dict[str, float]:
    """Scores of a task's own `oracle` and `floor` on test sequences, and the share of tokens that must attend.

    Args:
        task: a task; the methods `oracle(batch)` and `floor(batch)`, which return `Predictions`, are optional.
        seed: seed of the data.
        n_sequences: number of test sequences.

    Returns:
        "oracle_acc" and "floor_acc" for the methods that exist, and "oracle_reads_frac".

    Raises:
        ConfigError: when a prediction cannot be scored, or the oracle is less accurate than the floor.
    """
    batch = task.draw(range(n_sequences), seed=seed, split="test")
    found: dict[str, float] = {}
    for name in ("oracle", "floor"):
        method: Any = getattr(task, name, None)
        if method is None:
            continue
        try:
            predictions: Predictions = method(batch)
            found[f"{name}_acc"] = score(predictions, batch).retrieval_acc()
        except ValueError as error:
            raise ConfigError(f"task {type(task).__name__}.{name}: {error}") from error
    if found.get("oracle_acc", 1.0) < found.get("floor_acc", 0.0):
        raise ConfigError(
            f"task {type(task).__name__}: the oracle is right in {found['oracle_acc']:.3f} of the answers, "
            f"the floor in {found['floor_acc']:.3f}; the oracle must be the better one"
        )
    return found | {"oracle_reads_frac": float(batch.oracle_reads.sum()) / batch.n_tokens}
