"""The paper's claims beside what our records say of them; made anew whenever records arrive."""

from cramlab.report.claims.evidence import ClaimRow, Evidence, Verdict
from cramlab.report.claims.page import figures, sections

__all__ = ["ClaimRow", "Evidence", "Verdict", "figures", "sections"]
