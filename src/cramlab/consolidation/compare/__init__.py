"""Comparing consolidation with other ways of skipping the same share of far reads."""
