"""The redundancy audit: which attention of a pretrained model is predictable, and which is removable.

`over_text` audits a model on named text, `run` on token ids. The stages: `split` cuts documents, `probes` fits linear
probes on sums (`regression`), `redundancy` measures their predictions, `causal` measures the loss when something else
replaces attention's output (`replacement`), `figures` computes the figures and intervals of the `result`.
`over_training` audits the checkpoints of a training run.
"""

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.over_text import audit_text
from cramlab.auditing.result import AuditResult
from cramlab.auditing.run import audit
from cramlab.errors import AuditError
from cramlab.text import read_corpus

__all__ = ["AuditConfig", "AuditError", "AuditResult", "audit", "audit_text", "read_corpus"]
