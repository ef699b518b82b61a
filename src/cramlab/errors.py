"""Errors of the library: one base class, two kinds, and the errors that several packages raise.

An error that a single module raises is defined there, such as `RecordError` in `cramlab.records`. All
derive from `CramlabError` and from a built-in class such as `ValueError`.
"""

from __future__ import annotations


class CramlabError(Exception):
    """Base class of the library's errors; its message is one line that says what is wrong and how to fix it.

    Attributes:
        exit_code: exit code of the `cramlab` command after this error: 1 for a failure, 2 for bad usage.
    """

    exit_code = 1


class UsageError(CramlabError):
    """A name, value, model or text that cannot be used. Raised before the work begins."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """A field of a config does not exist or cannot take its value."""


class LoadError(UsageError, ValueError):
    """A model cannot be loaded, or its weights cannot be read."""


class AuditError(UsageError, ValueError):
    """A model, text or setting cannot be audited."""


class TextError(AuditError):
    """A text cannot be read, or holds nothing to read; an audit's error, as it was before consolidations read text."""


class ConsolidationError(UsageError, ValueError):
    """A model, text, folder or setting cannot be consolidated."""
