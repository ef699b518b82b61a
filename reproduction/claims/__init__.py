"""The paper's claims beside what our records say of them; made anew whenever records arrive."""

from reproduction.claims.evidence import ClaimRow, Evidence
from reproduction.claims.page import figures, sections
from reproduction.claims.verdict import Verdict

__all__ = ["ClaimRow", "Evidence", "Verdict", "figures", "sections"]
