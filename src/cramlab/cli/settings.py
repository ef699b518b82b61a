"""Names of experiments, sizes and mixers, and the fields of `--set`, which the command knows without importing torch.

They are kept in `settings.json`, which `python -m cramlab.cli.make_settings` makes from the code; a test compares them.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from cramlab.errors import UsageError
from cramlab.extensions import MIXERS, TASKS, declared, is_reference
from cramlab.names import Fields, nearest, split_assignment

FILE = "settings.json"
LABELS = ("experiment", "size", "mixer", "seed", "variant")  # fields that name a run, which --set must not change
_COLUMN = 48  # where the help's sentences start


@functools.cache
def table() -> dict[str, Any]:
    """The content of the file; see `make_settings.collected`."""
    return json.loads(importlib.resources.files("cramlab.cli").joinpath(FILE).read_text(encoding="utf-8"))


def check_run(name: str, size: str, overrides: Iterable[str] = ()) -> tuple[str, list[str] | None]:
    """Checks every name that `cramlab run` is given.

    Args:
        name: EXPERIMENT, TASK.py:CLASS or the name of a declared task; or any of these with /MIXER,MIXER...
        size: size of the task.
        overrides: assignments of `--set`.

    Returns:
        The experiment, or the reference of a task, and its mixers; None for the experiment's own.

    Raises:
        UsageError: when a name is unknown, or a field would mislabel the run.
    """
    known = table()
    experiment, slash, listed = split_name(name)
    if is_reference(experiment):
        return _check_own(experiment, listed.split(",") if slash else None, size, overrides)
    _check(experiment, "experiment", known["experiments"])
    _check(size, "--size", known["sizes"])
    mixers = listed.split(",") if slash else None
    mixers = _check_mixers(mixers)
    by_mixer = known["experiments"][experiment]["trees"]
    trees = [known["trees"][i] for mixer in mixers or [""] for i in by_mixer.get(mixer, ())]
    for assignment in overrides:
        _check_no_label(assignment)
        for tree in trees:
            split_assignment(assignment, _fields(tree))
    return experiment, mixers


def split_name(name: str) -> tuple[str, str, str]:
    """Splits NAME or NAME/MIXERS, where NAME is an experiment, the name of a task or a reference to one.

    A reference is `FILE.py:CLASS` or `MODULE:CLASS`; its file may lie in folders, whose slashes belong to it.

    Returns:
        The experiment or the reference of the task, the slash if there is one, and the mixers.
    """
    first, slash, rest = name.partition("/")
    if first in table()["experiments"]:
        return first, slash, rest
    if first in (tasks := declared(TASKS)):
        return tasks[first], slash, rest
    place, colon, after = name.partition(":")
    attribute, slash_after, mixers = after.partition("/")
    return (f"{place}:{attribute}", slash_after, mixers) if colon else (first, slash, rest)


def _check_own(
    task: str, mixers: list[str] | None, size: str, overrides: Iterable[str]
) -> tuple[str, list[str] | None]:
    """Checks the names for a task of one's own; its fields are known once its file is imported."""
    _check(size, "--size", table()["sizes"])
    for assignment in overrides:
        _check_no_label(assignment)
    return task, _check_mixers(mixers)


def _check_mixers(mixers: list[str] | None) -> list[str] | None:
    """The mixers, each once, with references in place of the names that packages declare."""
    if mixers is None:
        return None
    for i, mixer in enumerate(mixers):
        if mixer in mixers[:i]:
            raise UsageError(f'mixer "{mixer}" is named twice; name it once')
    outside = declared(MIXERS)
    named = [outside.get(mixer, mixer) if mixer not in table()["mixers"] else mixer for mixer in mixers]
    for mixer in named:
        if not is_reference(mixer):
            _check(mixer, "mixer", [*table()["mixers"], *outside])
    return named


def _check_no_label(assignment: str) -> None:
    if (field := assignment.partition("=")[0]) in LABELS:
        raise UsageError(f"--set {field} would mislabel the run; use NAME, --size or --seed")


def check_fields(command: str, overrides: Iterable[str]) -> None:
    """Checks the paths of the assignments of `--set` for `audit` or `consolidate`.

    Raises:
        ConfigError: when a field is unknown.
    """
    for assignment in overrides:
        split_assignment(assignment, _fields(table()["commands"][command]["tree"]))


def _check(name: str, what: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UsageError(f'{what} "{name}" is unknown{nearest(name, known)}')


def _fields(tree: list[Any]) -> Fields:
    """The fields of a config from the names of its classes, [class, {field: [class, {...}]}]."""
    config, groups = tree
    names = table()["configs"][config]
    return Fields(config, {name: _fields(groups[name]) if name in groups else None for name in names})


def help_text(command: str, *examples: str) -> str:
    """The end of a command's `--help`: examples, then every field of `--set` with its value and meaning."""
    width = max(60, min(160, shutil.get_terminal_size().columns - 2))
    lines = ["examples:", *(textwrap.fill(e, width, initial_indent="  ", subsequent_indent="    ") for e in examples)]
    known = table()["commands"][command]
    lines += ["", textwrap.fill(known["title"], width)]
    configs, shown = table()["configs"], None
    for path, (config, value) in known["values"].items():
        if config != shown:
            lines += ["", f" {config}"]
            shown = config
        setting, about = f"  {path} = {value}", configs[config][path.rpartition(".")[2]]
        room = setting.ljust(_COLUMN - 1) + " "
        if len(setting) >= _COLUMN:
            lines.append(setting)
            room = " " * _COLUMN
        lines += textwrap.wrap(about, width, initial_indent=room, subsequent_indent=" " * _COLUMN)
    return "\n".join(lines)
