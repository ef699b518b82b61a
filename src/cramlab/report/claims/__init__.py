"""The paper's claims beside what our records say of them; made anew whenever records arrive."""

from cramlab.report.claims.evidence import ClaimRow, Evidence
from cramlab.report.claims.page import figures, sections
from cramlab.report.verdict import Verdict

__all__ = ["ClaimRow", "Evidence", "Verdict", "figures", "sections"]
