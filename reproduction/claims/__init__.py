"""The paper's claims and the verdicts that follow from our records."""
