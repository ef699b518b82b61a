"""The redundancy audit: which attention is predictable, and which is removable."""

from cramlab.audit.config import AuditConfig
from cramlab.audit.errors import AuditError
from cramlab.audit.over_text import audit_text
from cramlab.audit.result import AuditResult
from cramlab.audit.run import audit
from cramlab.audit.text import read_corpus

__all__ = ["AuditConfig", "AuditError", "AuditResult", "audit", "audit_text", "read_corpus"]
