"""What the audit refuses, and why."""

from __future__ import annotations


class AuditError(ValueError):
    """A model, text or setting that cannot be audited; the message says which and what to do."""
