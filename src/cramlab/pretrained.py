"""`cramlab.load` and `cramlab.read_report`, without importing transformers before they are called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from cramlab.hf.consolidation_folder import Report


def load(model: str | nn.Module, folder: str | Path) -> nn.Module:
    """A pretrained model with what `cramlab consolidate` wrote into a folder; see `hf.consolidation_folder.load`."""
    from cramlab.hf.consolidation_folder import load

    return load(model, folder)


def read_report(model: nn.Module) -> Report:
    """Proof that a consolidation is live, and what has been read and skipped since it was loaded."""
    from cramlab.hf.consolidation_folder import report

    return report(model)
