"""Tasks and mixers from outside the package: `my_task.py:Task`, `package.module:Task`, or a name of an entry point.

A package declares its classes in `pyproject.toml`, under the groups `cramlab.tasks` and `cramlab.mixers`::

    [project.entry-points."cramlab.tasks"]
    lookup = "my_package.lookup:LookupConfig"
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cramlab.errors import ConfigError
from cramlab.names import nearest

TASKS, MIXERS = "cramlab.tasks", "cramlab.mixers"  # groups of entry points
_loaded: dict[str, type] = {}


def declared(group: str) -> dict[str, str]:
    """References by name that installed packages declare in a group of entry points."""
    import importlib.metadata  # which takes time, and most commands name nothing from outside

    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group=group)}


def is_reference(name: str) -> bool:
    """Whether a name is `FILE.py:CLASS` or `MODULE:CLASS`."""
    place, colon, attribute = name.rpartition(":")
    return bool(colon and place) and attribute.isidentifier()


def label(reference: str) -> str:
    """A short name of a class for folders and tables: `my_task.Task` for `path/my_task.py:Task`."""
    place, _, attribute = reference.rpartition(":")
    return f"{Path(place).name.removesuffix('.py').rpartition('.')[2]}.{attribute}"


def load_class(reference: str) -> type:
    """Imports the class that a reference names. Records name the class by this reference from then on.

    Args:
        reference: `FILE.py:CLASS`, a file relative to the working directory, whose folder is added to `sys.path`; or
            `MODULE:CLASS`, a module that can be imported.

    Raises:
        ConfigError: when there is no such file, module or class, the file has the name of another module, the import
            fails, or the class is not a config: a dataclass that can be made without arguments.
    """
    place, _, attribute = reference.rpartition(":")
    if place.endswith(".py"):
        reference = f"{os.path.normpath(place)}:{attribute}"
    if reference in _loaded:
        return _loaded[reference]
    module = _module_of_file(Path(place), reference) if place.endswith(".py") else _module(place, reference)
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f'"{reference}": {place} has no class "{attribute}"{nearest(attribute, classes)}')
    if not dataclasses.is_dataclass(found):
        raise ConfigError(f'"{reference}" is not a config; decorate the class with @checked of cramlab.config')
    try:
        found()
    except TypeError as error:
        raise ConfigError(
            f'"{reference}" cannot be made without arguments ({error}); give its fields defaults'
        ) from error
    found.RECORD_TYPE = reference  # type: ignore[attr-defined]
    _loaded[reference] = found
    return found


def loaded_classes() -> list[str]:
    """References of all classes that this process has loaded."""
    return list(_loaded)


def load_classes(references: Iterable[str]) -> None:
    """Loads what `loaded_classes` returned in another process, so that records name the classes as they do there."""
    for reference in references:
        load_class(reference)


def _module(name: str, reference: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module of the user's may raise anything
        raise ConfigError(f'"{reference}" cannot be imported: {type(error).__name__}: {error}') from error


def _module_of_file(path: Path, reference: str) -> Any:
    """The module in a file. It is imported by its own name, so that other processes can import it too."""
    if not path.is_file():
        raise ConfigError(f'"{reference}": there is no file {path} in {Path.cwd()}; start the command where it is')
    name, folder = path.stem, str(path.parent.resolve())
    if not name.isidentifier():
        raise ConfigError(f'"{reference}": "{name}" cannot be imported; rename the file to letters, digits and _')
    if folder not in sys.path:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
    module = _module(name, reference)
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise ConfigError(f'"{reference}": "{name}" is also the name of another module; rename the file')
    return module
