"""The `cramlab` command: parsing and printing; the work is done elsewhere."""

from cramlab.cli.main import main

__all__ = ["main"]
