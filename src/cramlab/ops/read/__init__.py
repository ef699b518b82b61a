"""Attention of some queries to some entries: in windows, and by a fused kernel."""
