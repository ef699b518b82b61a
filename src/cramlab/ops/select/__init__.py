"""Choosing some tokens of each sequence, and putting them back."""
