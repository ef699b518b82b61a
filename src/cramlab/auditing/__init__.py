"""The redundancy audit: which attention is predictable, and which is removable."""

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.over_text import audit_text
from cramlab.auditing.result import AuditResult
from cramlab.auditing.run import audit
from cramlab.auditing.text import read_corpus
from cramlab.errors import AuditError

__all__ = ["AuditConfig", "AuditError", "AuditResult", "audit", "audit_text", "read_corpus"]
