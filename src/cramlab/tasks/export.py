"""Writes SRCD and recall tasks to `.npz` or Parquet for other trainers, with a datasheet and a content hash."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cramlab.files import whole, write_json
from cramlab.metrics import Scores, score
from cramlab.tasks import changing
from cramlab.tasks.changing import ChangingConfig, changed_sample
from cramlab.tasks.recall import RecallTask
from cramlab.tasks.srcd import VERSION, SRCDConfig, collate, sample
from cramlab.tasks.srcd_oracles import chance_acc, memoriser_acc, oracle
from cramlab.tasks.task import Split, check_stream

FIELDS = {
    "kind": "0 flow, 1 write, 2 query",
    "value": "value written, 0 to n_values - 1; n_values where nothing is written",
    "key_id": "id of the key; -1 where there is none or the key is a vector without an id",
    "key": "vector key as observed, key_dim numbers; zero where there is none",
    "gap": "time since the previous event",
    "horizon": "time until the next event",
    "level": "level at this event",
    "next_level": "target of the dynamics head",
    "answer": "target of the retrieval head, -1 where nothing is asked",
    "recurring": "the query asks for a recurring pattern",
    "novel": "the query asks for a binding made for this sequence",
    "rebound": "the query asks for a recurring key that means another value in this sequence, or, with change, for the "
    "first time since it changed or appeared",
    "pattern": "number of the recurring pattern that the query asks for; -1 elsewhere. No input",
    "write_position": "where the queried binding was written; -1 where nothing is asked. No input",
}

RECALL_FIELDS = {
    "token": "token of the only channel",
    "answer": FIELDS["answer"],
    "novel": "the token asks; other slices of the task are fields too",
}


def content_hash(arrays: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of names, types, shapes and bytes in order of name: the same for both file formats."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def export(config: SRCDConfig | RecallTask, path: Path, *, seed: int, split: Split, n_sequences: int) -> dict[str, Any]:
    """Writes the first `n_sequences` of a split to `path` and its datasheet beside it.

    Args:
        config: parameters of the generator, an `SRCDConfig`, a `ChangingConfig` or a recall task.
        path: file that ends in `.npz` (one array per field, (n_sequences, seq_len, ...)) or `.parquet` (one row per
            token, with `sequence` and `position`; needs the extra `cramlab[parquet]`).
        seed: seed of the data.
        split: "train", "validation" or "test".
        n_sequences: number of sequences.

    Returns:
        The datasheet, as written to `PATH.datasheet.json`.

    Raises:
        ValueError: when the path has another ending or is a folder, `n_sequences` is below 1, split or seed is
            invalid, or the config is that of another task.
        ImportError: when Parquet is asked for and pyarrow is not installed.
    """
    path = Path(path)
    if type(config) not in (SRCDConfig, ChangingConfig) and not isinstance(config, RecallTask):
        raise ValueError(f"config is a {type(config).__name__}; give an SRCDConfig, a ChangingConfig or a recall task")
    if path.suffix not in (".npz", ".parquet"):
        raise ValueError(f'path "{path}" ends in "{path.suffix}"; give a name that ends in .npz or .parquet')
    if path.is_dir():
        raise ValueError(f'path "{path}" is a folder; give the name of a file')
    check_stream(split, seed=seed, n_sequences=n_sequences)
    if n_sequences < 1:
        raise ValueError(f"n_sequences = {n_sequences} must be at least 1")
    if path.suffix == ".parquet":
        _pyarrow()
    if isinstance(config, RecallTask):
        arrays, about = _recall(config, seed, split, n_sequences)
    else:
        arrays, about = _srcd(config, seed, split, n_sequences)
    datasheet = {
        **about,
        "config": dataclasses.asdict(config),
        "seed": seed,
        "split": split,
        "n_sequences": n_sequences,
        "n_queries": int((arrays["answer"] >= 0).sum()),
        "sha256": content_hash(arrays),
        "licence": "Apache-2.0; synthetic, holds nothing about people",
    }
    beside = path.with_name(path.name + ".datasheet.json")
    with whole(path) as partial:
        if path.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        else:
            _write_parquet(partial, arrays)
        beside.unlink(missing_ok=True)  # an interrupted export leaves no outdated datasheet
    write_json(beside, datasheet)
    return datasheet


def _srcd(config: SRCDConfig, seed: int, split: Split, n: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of n sequences of SRCD, and what their datasheet says about the task."""
    if isinstance(config, ChangingConfig):
        samples = [changed_sample(config, seed=seed, split=split, index=i) for i in range(n)]
        task, version = "srcd-changing", changing.VERSION
        remembered = changing.memoriser_acc(config, range(n), seed=seed)
    else:
        samples = [sample(config, seed=seed, split=split, index=i) for i in range(n)]
        task, version, remembered = "srcd", VERSION, memoriser_acc(config)
    arrays = {name: np.stack([s[name] for s in samples]) for name in FIELDS}
    oracle_says = {
        "retrieval_acc": _oracle_acc(config, samples),
        "dynamics_mse": config.dynamics_floor,
        "attention_frac": float((arrays["novel"] | arrays["rebound"]).mean()),
    }
    floors = {"chance": chance_acc(config), "memoriser": remembered}
    return arrays, {"task": task, "version": version, "fields": FIELDS, "oracle": oracle_says, "floors": floors}


def _recall(config: RecallTask, seed: int, split: Split, n: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of n sequences of a recall task, and what their datasheet says about the task."""
    batch = config.draw(range(n), seed=seed, split=split)
    asked = batch.retrieval_mask
    arrays = {
        "token": batch.discrete[..., 0].numpy(),
        "answer": batch.retrieval_target.masked_fill(~asked, -1).numpy(),
        **{name: mask.numpy() for name, mask in batch.slices.items()},
    }
    accuracy = {name: score(getattr(config, name)(batch), batch).retrieval_acc() for name in ("oracle", "floor")}
    return arrays, {
        "task": type(config).__name__,
        "version": 1,
        "fields": RECALL_FIELDS,
        "slices": list(batch.slices),
        "oracle": {"retrieval_acc": accuracy["oracle"], "attention_frac": float(batch.oracle_reads.float().mean())},
        "floors": {"floor": accuracy["floor"]},
    }


def _oracle_acc(config: SRCDConfig, samples: list[dict[str, np.ndarray]]) -> float | None:
    """Returns the oracle's retrieval accuracy on these sequences; None when they hold no query."""
    total = Scores()
    for one in samples:
        batch = collate(config, [one])
        total = total + score(oracle(config, batch), batch)
    return total.retrieval_acc() if total.n_queries["all"] else None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('writing Parquet needs pyarrow; install "cramlab[parquet]" or export to .npz') from error
    return pyarrow


def _write_parquet(path: Path, arrays: dict[str, np.ndarray]) -> None:
    pyarrow = _pyarrow()
    n_sequences, seq_len = arrays["answer"].shape
    columns: dict[str, Any] = {
        "sequence": np.repeat(np.arange(n_sequences), seq_len),
        "position": np.tile(np.arange(seq_len), n_sequences),
    }
    for name, array in arrays.items():
        flat = array.reshape(n_sequences * seq_len, -1)
        columns[name] = list(flat) if array.ndim == 3 else flat[:, 0]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
