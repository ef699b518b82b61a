"""Configs as frozen dataclasses: to and from plain data, `path=value` overrides, a hash."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


class ConfigError(ValueError):
    """A field that does not exist or a value that it cannot take; the message says which and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the known name nearest to a wrong one, or the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


def to_dict(config: Any) -> Any:
    """Nested dataclasses as plain JSON data. A dataclass held by a field of several types also names its own."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {"type": type(config).__name__} | {
            f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)
        }
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    return config


def config_hash(config: Any) -> str:
    """First 16 hex digits of the SHA-256 of the config's canonical JSON."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differing(a: Any, b: Any, path: str = "") -> dict[str, Any]:
    """The paths of all leaves in which two results of `to_dict` differ, with their values in `a`."""
    if isinstance(a, dict) and isinstance(b, dict):
        fields = sorted(a.keys() | b.keys())
        return {p: v for f in fields for p, v in differing(a.get(f), b.get(f), _join(path, f)).items()}
    return {} if a == b else {path: a}


def from_dict(data: Any, like: T) -> T:
    """The inverse of `to_dict`, guided by a config of the same shape.

    Args:
        data: plain data.
        like: a config whose nested types are the wanted ones; its values are replaced.

    Raises:
        ConfigError: when a field or type is unknown.
    """
    return _restore(data, like, "")


def _restore(data: Any, like: Any, path: str) -> Any:
    if dataclasses.is_dataclass(like):
        if data.get("type") != type(like).__name__:
            raise ConfigError(f"{path or 'config'} is a {data.get('type')}, not a {type(like).__name__}")
        known = {f.name for f in dataclasses.fields(like)}
        for name in data.keys() - known - {"type"}:
            raise ConfigError(f"{_join(path, name)} is unknown{nearest(name, known)}")
        values = {n: _restore(data[n], getattr(like, n), _join(path, n)) for n in known if n in data}
        return dataclasses.replace(like, **values)  # type: ignore[type-var]
    if isinstance(like, tuple) and like and dataclasses.is_dataclass(like[0]):
        kinds = like if len(like) == len(data) else like[:1] * len(data)  # of one kind, or one for each place
        return tuple(_restore(data[i], kind, f"{path}[{i}]") for i, kind in enumerate(kinds))
    return tuple(data) if isinstance(data, list) else data


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def override(config: T, assignment: str) -> T:
    """The config with one field changed by an assignment such as `model.mixer.router.name=never`.

    Raises:
        ConfigError: naming the field, the value and the fix.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f'--set "{assignment}" is no assignment; write path=value, as in training.learning_rate=1e-3')
    return _override(config, path.split("."), text, path)


def _override(config: Any, names: list[str], text: str, path: str) -> Any:
    name, rest = names[0], names[1:]
    fields = {f.name for f in dataclasses.fields(config)}
    if name not in fields:
        raise ConfigError(f'field "{path}" is unknown: {type(config).__name__} has no "{name}"{nearest(name, fields)}')
    value = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(value):
            raise ConfigError(f'field "{path}" is unknown: "{name}" has no fields of its own')
        new = _override(value, rest, text, path)
    else:
        if dataclasses.is_dataclass(value):
            inner = ", ".join(f.name for f in dataclasses.fields(value))
            raise ConfigError(f'field "{path}" is a group; set one of its fields: {inner}')
        new = _parse(text, typing.get_type_hints(type(config))[name], path)
    return dataclasses.replace(config, **{name: new})


def _parse(text: str, kind: Any, path: str) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        if option is type(None) and text.lower() in ("none", "null"):
            return None
        if get_origin(option) is Literal and text in get_args(option):
            return text
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option is str:
            return text
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if (entry := _entry(option)) is not None:
            try:
                return tuple(_parse(part.strip(), entry, path) for part in text.split(",") if part.strip())
            except ConfigError:
                continue
    raise ConfigError(f'{path} = "{text}" does not fit; give {" or ".join(_describe(o) for o in options)}')


def _entry(kind: Any) -> Any:
    """What a sequence of any length holds; None where it is no such sequence, or holds no plain values."""
    entry, *more = get_args(kind) if get_origin(kind) is tuple else (None,)
    return entry if more == [...] and entry in (int, float, str) else None


def _describe(kind: Any) -> str:
    if (entry := _entry(kind)) is not None:
        return f"values parted by commas, each {_describe(entry)}"
    if kind is type(None):
        return "none"
    if get_origin(kind) is Literal:
        return ", ".join(f'"{v}"' for v in get_args(kind))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}.get(kind, str(kind))
