"""The files in a run's folder, and checks that they belong to that run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.config import changed_since, config_hash, to_dict
from cramlab.files import DamagedFileError, load_checkpoint
from cramlab.training.run import RunConfig

CONFIG, RECORD, CHECKPOINT = "config.json", "record.json", "checkpoint.pt"
_HELD = {"model": dict, "average": dict, "practice": dict, "optimizers": list, "progress": dict}


def refuse_to_overwrite(config: RunConfig, folder: Path, *, resume: bool) -> None:
    """Refuses to train into a folder that holds a run, unless `resume` is true and the config is the same.

    Raises:
        FileExistsError: when the folder holds a run, and `resume` is false or the config differs.
        DamagedFileError: when a file in it cannot be read, or belongs to another run than its `config.json`.
    """
    held = [name for name in (CONFIG, RECORD, CHECKPOINT) if (folder / name).exists()]
    if not held:
        return
    if not resume:
        raise FileExistsError(
            f"{folder} already holds a run ({', '.join(held)}); continue it with --resume or choose another --out"
        )
    if CONFIG in held:
        found = records.read_json(folder / CONFIG)
        if changed := _changed(found, config):
            raise FileExistsError(
                f"{folder} holds a run with another config (differs in {', '.join(changed) or CONFIG}); "
                "choose another --out or give the same settings"
            )
    if RECORD in held:
        own_record(folder, config)
    elif CHECKPOINT in held and CONFIG not in held and "config_hash" not in own_checkpoint(folder, config):
        raise DamagedFileError(f"{folder / CHECKPOINT} does not name its run, and {CONFIG} is missing; remove it first")


def own_record(folder: Path, config: Any) -> dict[str, Any]:
    """The record in a run's folder.

    Args:
        folder: the run's folder.
        config: the run's config, or what `to_dict` returned for it.

    Raises:
        RecordError: when the record is damaged, or belongs to a run with another config.
    """
    record = records.read(folder / RECORD)
    if changed := _changed(record["config"], config):
        raise records.RecordError(
            f"{folder / RECORD} belongs to another run (differs in {', '.join(changed)}); put the run's own "
            "in its place, or remove it and continue with --resume"
        )
    return record


def own_checkpoint(folder: Path, config: Any) -> dict[str, Any]:
    """The checkpoint in a run's folder; the arguments are those of `own_record`.

    Checkpoints of early versions hold no hash of the config. Of these, only the parts are checked here; shapes are
    checked when the weights are loaded.

    Raises:
        DamagedFileError: when it is damaged, is not a checkpoint of a run, or belongs to a run with another config.
    """
    path = folder / CHECKPOINT
    saved = load_checkpoint(path)
    if wrong := [name for name, kind in _HELD.items() if not isinstance(saved.get(name), kind)]:
        raise DamagedFileError(f"{path} is not a checkpoint of a run: it lacks {', '.join(wrong)}; remove it")
    hashes = {run_hash(config), config_hash(config)}
    if (folder / CONFIG).exists():  # perhaps of an earlier version, which had fewer fields
        found = records.read_json(folder / CONFIG)
        hashes |= set() if _changed(found, config) else {run_hash(found), config_hash(found)}
    if "config_hash" in saved and saved["config_hash"] not in hashes:
        raise DamagedFileError(
            f"{path} belongs to another run (seed {saved.get('seed')}, config {saved['config_hash']}); put "
            "the run's own in its place, or remove it and continue with --resume"
        )
    return saved


def run_hash(config: Any) -> str:
    """Hash of a run's config, or of its data, without the number of devices: a run may go on with another one."""
    data = to_dict(config)
    training = {name: value for name, value in data.get("training", {}).items() if name != "devices"}
    return config_hash(data | {"training": training})


def _changed(held: Any, config: Any) -> dict[str, Any]:
    """What `changed_since` finds, but for the number of devices."""
    return {path: value for path, value in changed_since(held, config).items() if path != "training.devices"}


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Replaces torch's errors by one that names the checkpoint, in code that loads parts of it.

    Raises:
        DamagedFileError: when a part does not fit.
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
