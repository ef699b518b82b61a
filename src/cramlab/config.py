"""Configs as frozen dataclasses: checked when made, to and from plain data, `path=value` overrides, a hash."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

import pydantic
import pydantic.dataclasses

from cramlab.errors import ConfigError
from cramlab.names import Fields, nearest, shown, split_assignment

T = TypeVar("T")

# Types of fields. Upper bounds are far above any use; beyond them memory or 32 bits overflow, or a loop never ends.
Size = Annotated[int, pydantic.Field(ge=1, le=2**20)]
Layers = Annotated[int, pydantic.Field(ge=1, le=1024)]
Threads = Annotated[int, pydantic.Field(ge=1, le=1024)]
Count = Annotated[int, pydantic.Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, pydantic.Field(ge=0, le=2**40)]
Seed = Annotated[int, pydantic.Field(ge=0, le=2**32 - 1)]  # the range of seeds that all random generators accept
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Positive = Annotated[float, pydantic.Field(ge=1e-12, le=1e30)]
Weight = Annotated[float, pydantic.Field(ge=0, le=1e30)]
Name = Annotated[str, pydantic.StringConstraints(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.=+-]*)?$", max_length=128)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def checked(place: str) -> Callable[[type[T]], type[T]]:
    """Makes a frozen dataclass that checks every instance: types, finiteness and ranges of all fields.

    A whole number is accepted as a number. Nothing else is converted: no bool, text or number of numpy to a whole
    number, no list to a tuple, no NaN. `__post_init__` checks only conditions on several fields.

    Args:
        place: path of its fields in `--set`, for messages; empty: none.

    Raises:
        ConfigError: from the class, when an instance is made, naming the field, the value and the fix.
    """

    def make(cls: type[T]) -> type[T]:
        strict = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", arbitrary_types_allowed=True)
        made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=strict)(cls)
        unchecked = made.__init__

        def init(self: Any, *args: Any, **values: Any) -> None:
            try:
                unchecked(self, *args, **values)
            except pydantic.ValidationError as error:
                raise ConfigError(_explained(error, type(self), values, place)) from None

        made.__init__ = functools.wraps(unchecked)(init)
        return made

    return make


_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def _explained(error: pydantic.ValidationError, kind: Any, values: dict[str, Any], place: str) -> str:
    """The first error that pydantic found in the values for an instance of `kind`, in one line."""
    found: list[Any] = error.errors(include_url=False)
    cause, (*within,) = found[0]["type"], found[0]["loc"]
    if cause == "value_error":  # of `__post_init__`, which names the field itself
        return str(found[0]["ctx"]["error"])
    if not within or not isinstance(within[0], str):
        return f"{kind.__name__} takes fields by name alone, as in {kind.__name__}(field=value)"
    field, hints = within[0], typing.get_type_hints(kind)
    path = _join(place, field)
    if field not in hints:
        return f'field "{path}" is unknown: {kind.__name__} has no "{field}"{nearest(field, hints)}'
    if cause == "missing":
        return f"{path} is missing; give {_asked_for(hints[field])}"
    given = f"{path} = {shown(values[field])}"
    must_be = "must each be" if isinstance(values[field], tuple) else "must be"
    if len(found) == 1 and cause in _LIMITS:
        word, limit = _LIMITS[cause]
        nothing = ", or None" if type(None) in get_args(hints[field]) else ""
        return f"{given} {must_be} {word} {found[0]['ctx'][limit]:,}{nothing}"
    if cause == "finite_number":
        return f"{given} {must_be} finite; give {_asked_for(hints[field])}"
    if cause in ("string_pattern_mismatch", "string_too_long"):
        return f"{given} is not a plain name; give letters, digits and . _ - = + in it"
    return f"{given} does not fit; give {_asked_for(hints[field])}"


def replaced(config: T, settings: dict[str, Any]) -> T:
    """The config with fields replaced by name; lists become tuples.

    Raises:
        ConfigError: when a field does not exist or cannot take its value.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return dataclasses.replace(config, **values) if values else config  # type: ignore[type-var]


def _type_in_records(config: Any) -> str:
    """The name of a config's class in JSON; a renamed class keeps its first one, as `RECORD_TYPE`."""
    return getattr(config, "RECORD_TYPE", type(config).__name__)


def to_dict(config: Any) -> Any:
    """Nested dataclasses as plain JSON data. A dataclass held by a field of several types also names its own."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {"type": _type_in_records(config)} | {
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


def changed_since(held: Any, config: Any) -> dict[str, Any]:
    """The paths of all leaves in which the held data of a config differ from a config, with their values in the data.

    Fields that are younger than the data count as held with their defaults, so that work of earlier versions goes on.

    Args:
        held: plain data as `to_dict` returned it, perhaps in an earlier version.
        config: the config.
    """
    return differing(_with_younger_fields(held, config), to_dict(config))


def _with_younger_fields(held: Any, like: Any) -> Any:
    if isinstance(like, (tuple, list)) and isinstance(held, list) and len(held) == len(like):
        return [_with_younger_fields(part, item) for part, item in zip(held, like, strict=True)]
    if not (isinstance(held, dict) and dataclasses.is_dataclass(like)):
        return held
    filled = dict(held)
    for f in dataclasses.fields(like):
        if f.name in held:
            filled[f.name] = _with_younger_fields(held[f.name], getattr(like, f.name))
        elif f.default is not dataclasses.MISSING:
            filled[f.name] = to_dict(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            filled[f.name] = to_dict(f.default_factory())
    return filled


def from_dict(data: Any, like: T) -> T:
    """The inverse of `to_dict`, guided by a config of the same shape.

    Args:
        data: plain data, whatever it may hold.
        like: a config whose nested types are the wanted ones. Fields that are younger than the data keep its values.

    Raises:
        ConfigError: when a field or type is unknown, a field without a default is missing, or a value does not fit.
    """
    return _restore(data, like, "")


def _restore(data: Any, like: Any, path: str) -> Any:
    is_group = dataclasses.is_dataclass(like) and not isinstance(like, type)
    if is_group and (data is not None or not path):  # the enclosing class decides whether a group may be missing
        if not isinstance(data, dict) or data.get("type") != _type_in_records(like):
            found = data.get("type") if isinstance(data, dict) else shown(data)
            raise ConfigError(f"{path or 'config'} is a {found}, not a {_type_in_records(like)}")
        fields = {f.name: f for f in dataclasses.fields(like)}
        for name in sorted(data.keys() - fields.keys() - {"type"}):
            raise ConfigError(f"{_join(path, name)} is unknown{nearest(name, fields)}")
        for name, field in fields.items():
            if name not in data and field.default is field.default_factory is dataclasses.MISSING:
                raise ConfigError(
                    f"{_join(path, name)} is missing; add it to the config, or start the run again in another folder"
                )
        values = {n: _restore(data[n], getattr(like, n), _join(path, n)) for n in fields if n in data}
        return dataclasses.replace(like, **values)  # type: ignore[type-var]
    if isinstance(like, tuple) and like and dataclasses.is_dataclass(like[0]):
        if not isinstance(data, list):
            raise ConfigError(f"{path} = {shown(data)} does not fit; give a list")
        kinds = like if len(like) == len(data) else like[:1] * len(data)  # of one kind, or one for each entry
        return tuple(_restore(data[i], kind, f"{path}[{i}]") for i, kind in enumerate(kinds))
    return tuple(data) if isinstance(data, list) else data


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def overridden(config: T, assignments: Iterable[str]) -> T:
    """The config with fields changed by assignments such as `model.mixer.router.name=never`.

    All are applied together and the result is checked once, so that the order of fields does not matter; where one
    field is set several times, the last counts.

    Raises:
        ConfigError: naming the field, the value and the fix.
    """
    return _changed(config, assigned(config, assignments))


def assigned(config: Any, assignments: Iterable[str]) -> dict[str, Any]:
    """The values of assignments such as `router.name=never` by field; those of a group are a dict.

    Args:
        config: config whose fields they name; its values do not matter.
        assignments: `path=value` each.

    Raises:
        ConfigError: when a path is no field, or a value is not of the field's type.
    """
    fields, changes = fields_of(config), dict[str, Any]()
    for assignment in assignments:
        (*groups, last), text = split_assignment(assignment, fields)
        group, within = config, changes
        for name in groups:
            group, within = getattr(group, name), within.setdefault(name, {})
        within[last] = _parse(text, typing.get_type_hints(type(group))[last], ".".join((*groups, last)))
    return changes


def fields_of(config: Any) -> Fields:
    """The names of a config's fields."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    groups = {name: fields_of(value) if dataclasses.is_dataclass(value) else None for name, value in values.items()}
    return Fields(type(config).__name__, groups)


def leaves(config: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every field that `--set` can change: its path, the name of the class it belongs to, and its value as text."""
    found: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += leaves(value, f"{path}.")
        elif not isinstance(value, tuple):
            found.append((path, type(config).__name__, str(value)))
        elif not any(map(dataclasses.is_dataclass, value)):
            found.append((path, type(config).__name__, ",".join(map(str, value))))
    return found


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """The config with new values; those of a group are a dict."""
    new = {n: _changed(getattr(config, n), c) if isinstance(c, dict) else c for n, c in changes.items()}
    return dataclasses.replace(config, **new) if new else config


def _parse(text: str, kind: Any, path: str) -> Any:
    options = _options(kind)
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
    raise ConfigError(f"{path} = {shown(text)} does not fit; give {_asked_for(kind)}")


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _asked_for(kind: Any) -> str:
    """Describes the values that a field of this type takes."""
    return " or ".join(_describe(option) for option in _options(kind))


def _entry(kind: Any) -> Any:
    """Type of the entries of a sequence of any length; None for other types and entries that are no plain values."""
    entry, *more = get_args(kind) if get_origin(kind) is tuple else (None,)
    return entry if more == [...] and entry in (int, float, str) else None


def _describe(kind: Any) -> str:
    if (entry := _entry(kind)) is not None:
        return f"values parted by commas, each {_describe(entry)}"
    if kind is type(None):
        return "none"
    if get_origin(kind) is Literal:
        return ", ".join(f'"{v}"' for v in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a tuple, each {_asked_for(get_args(kind)[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return names.get(kind, f"a {getattr(kind, '__name__', kind)}")
