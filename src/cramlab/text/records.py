"""The text that a record holds: which of its fields, and what a conversation is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cramlab.errors import TextError
from cramlab.text.corpus import Document, Message, joined

FIELDS = ("text", "content", "messages", "conversations")
_NAMES = (("role", "content"), ("from", "value"))  # of a message's fields; the second pair is that of ShareGPT
_ROLES = {"human": "user", "gpt": "assistant"}  # roles of ShareGPT


def field_of(names: Iterable[str], asked: str | None, where: str) -> str:
    """Returns the field that holds the text of a record.

    Args:
        names: names of the record's fields.
        asked: the field that was asked for; None: the only one of `FIELDS` that is there.
        where: file and record, for errors.

    Raises:
        TextError: when the field is not there, or several could be meant; names those that are there.
    """
    names = list(names)
    if asked is not None:
        if asked not in names:
            raise TextError(
                f'{where}: has no field "{asked}" but only {", ".join(names)}; every record needs the field that holds '
                "the text, see --text-field (text_field)"
            )
        return asked
    found = [name for name in FIELDS if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise TextError(
            f"{where}: has the fields {' and '.join(found)}, each of which could hold the text; choose one with "
            f"--text-field {found[0]} (text_field)"
        )
    raise TextError(
        f"{where}: has none of the fields {', '.join(FIELDS)} but only {', '.join(names)}; name the one that holds the "
        "text with --text-field NAME (text_field)"
    )


def document_of(name: str, value: Any, field: str, where: str) -> Document:
    """Returns the document of a field's value: a string, or a list of messages.

    Args:
        name: name of the document.
        value: the value.
        field: name of the field.
        where: file and record, for errors.

    Raises:
        TextError: when the value is neither.
    """
    messages: tuple[Message, ...] = ()
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        messages = tuple(_message(item, f'{where}: "{field}", message {i}') for i, item in enumerate(value, start=1))
        value = joined(messages)
    if not isinstance(value, str):
        shown = json.dumps(value, default=str)[:40]
        raise TextError(f'{where}: "{field}" is {shown} and not a string, nor a list of messages')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TextError(f'{where}: "{field}" holds half of a surrogate pair, which text does not contain') from error
    return Document(name, value, messages)


def _message(item: Mapping[str, Any], where: str) -> Message:
    for role, content in _NAMES:
        if role in item and content in item:
            who = item[role]
            if not isinstance(who, str):
                raise TextError(f'{where}: "{role}" is {json.dumps(who, default=str)[:40]} and not a string')
            return {"role": _ROLES.get(who, who), "content": _content(item[content], f'{where}: "{content}"')}
    raise TextError(f"{where} has the fields {', '.join(item)}, but a message has role and content (or from and value)")


def _content(value: Any, where: str) -> str:
    """The text of a message: a string, nothing (a call of a tool), or parts that are texts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    raise TextError(f"{where} is {json.dumps(value, default=str)[:40]} and not text; leave such messages out")
