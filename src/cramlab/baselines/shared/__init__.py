"""Machinery that several baselines use; no mixer is here."""
