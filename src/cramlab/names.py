"""Names that users write: unknown ones are refused with the nearest known name, without importing what they name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from cramlab.errors import ConfigError


class Fields(NamedTuple):
    """Names of a config's fields.

    Attributes:
        config: name of the config's class.
        groups: for each field its own fields, or None for a field that holds a plain value.
    """

    config: str
    groups: dict[str, Fields | None]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the known name nearest to a wrong one, or `; known: ...` with all known names."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


def shown(value: Any) -> str:
    """A value as messages show it, in one short line of ASCII characters."""
    text = json.dumps(value) if isinstance(value, str) else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def split_assignment(assignment: str, fields: Fields) -> tuple[list[str], str]:
    """Splits an assignment such as `router.name=never` into the names of its path and the text of its value.

    Raises:
        ConfigError: when it is not an assignment, or its path does not name a field that holds a plain value.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(
            f"--set {shown(assignment)} is not an assignment; write path=value, as in training.learning_rate=1e-3"
        )
    names = path.split(".")
    group: Fields | None = fields
    for i, name in enumerate(names):
        if group is None:
            raise ConfigError(f'field "{path}" is unknown: "{names[i - 1]}" has no fields of its own')
        if name not in group.groups:
            raise ConfigError(
                f"field {shown(path)} is unknown: {group.config} has no {shown(name)}{nearest(name, group.groups)}"
            )
        group = group.groups[name]
    if group is not None:
        raise ConfigError(f'field "{path}" is a group; set one of its fields: {", ".join(group.groups)}')
    return names, text
