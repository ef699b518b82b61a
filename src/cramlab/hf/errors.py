"""What a consolidation refuses, and why; needs no transformers."""

from __future__ import annotations


class ConsolidationError(ValueError):
    """A model, folder or setting that does not fit; the message says why and what to do."""
