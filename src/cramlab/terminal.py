"""Makes text from files safe to show: it can neither break nor control a terminal or page."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """A text, or all texts in nested data, with U+FFFD for control characters, halves of characters and the like."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in value)
    if isinstance(value, dict):
        return {plain(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value
