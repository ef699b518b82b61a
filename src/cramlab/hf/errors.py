"""What is refused in a pretrained model, and why; needs no transformers."""

from __future__ import annotations


class LoadError(ValueError):
    """A model that cannot be loaded, or whose weights cannot be read; the message says why and what to do."""


class ConsolidationError(ValueError):
    """A model, folder or setting that does not fit; the message says why and what to do."""
