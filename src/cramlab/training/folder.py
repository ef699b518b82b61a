"""What a run keeps in its folder, and whether that is its own: other runs' files are never taken for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.config import config_hash, differing, to_dict
from cramlab.files import DamagedFileError, load_checkpoint
from cramlab.training.run import RunConfig

CONFIG, RECORD, CHECKPOINT = "config.json", "record.json", "checkpoint.pt"
_HELD = {"model": dict, "average": dict, "practice": dict, "optimizers": list, "progress": dict}


def refuse_to_overwrite(config: RunConfig, folder: Path, *, resume: bool) -> None:
    """Nothing that the user has is lost or mixed up: a folder in use needs `resume`, and only for the same config.

    Raises:
        FileExistsError: when the folder holds a run, and `resume` is false or the run is another.
        DamagedFileError: when a file in it cannot be read, or is of another run than its `config.json`.
    """
    held = [name for name in (CONFIG, RECORD, CHECKPOINT) if (folder / name).exists()]
    if not held:
        return
    if not resume:
        raise FileExistsError(
            f"{folder} already holds a run ({', '.join(held)}); continue it with --resume or choose another --out"
        )
    data = to_dict(config)
    if CONFIG in held:
        found = records.read_json(folder / CONFIG)
        if changed := differing(found, data):
            raise FileExistsError(
                f"{folder} holds a run with another config (differs in {', '.join(changed) or CONFIG}); "
                "choose another --out or give the same settings"
            )
    if RECORD in held:
        own_record(folder, data)
    elif CHECKPOINT in held and CONFIG not in held and "config_hash" not in own_checkpoint(folder, data):
        raise DamagedFileError(f"{folder / CHECKPOINT} does not say whose it is, and {CONFIG} is gone; remove it first")


def own_record(folder: Path, data: Any) -> dict[str, Any]:
    """The record in a run's folder.

    Args:
        folder: of the run.
        data: the run's config as `to_dict` gives it.

    Raises:
        RecordError: when the record is damaged, or of a run with another config.
    """
    record = records.read(folder / RECORD)
    if changed := differing(record["config"], data):
        raise records.RecordError(
            f"{folder / RECORD} is of another run than the folder (differs in {', '.join(changed)}); put the run's own "
            "in its place, or remove it and continue with --resume"
        )
    return record


def own_checkpoint(folder: Path, data: Any) -> dict[str, Any]:
    """The checkpoint in a run's folder; arguments as in `own_record`.

    A checkpoint of before the hash says nothing about its run: what can be checked then is what it consists of, and,
    by whoever loads it, the shapes.

    Raises:
        DamagedFileError: when it is damaged, no checkpoint of a run, or of a run with another config.
    """
    path = folder / CHECKPOINT
    saved = load_checkpoint(path)
    if wrong := [name for name, kind in _HELD.items() if not isinstance(saved.get(name), kind)]:
        raise DamagedFileError(f"{path} is no checkpoint of a run: it lacks {', '.join(wrong)}; remove it")
    if saved.get("config_hash", config_hash(data)) != config_hash(data):
        raise DamagedFileError(
            f"{path} is of another run than the folder (seed {saved.get('seed')}, config {saved['config_hash']}); put "
            "the run's own in its place, or remove it and continue with --resume"
        )
    return saved


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around code that loads parts of a checkpoint: where they do not fit, the file is named.

    Raises:
        DamagedFileError: in place of torch's own errors.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(
            f"{path} does not fit the run's config ({reason}); put the run's own in its place, or remove it and "
            "continue with --resume"
        ) from error
