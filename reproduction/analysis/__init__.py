"""Findings from records: transitions, practice curves, bounds. Plain numbers in and out, no torch."""
