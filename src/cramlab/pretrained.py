"""`cramlab.load` and `cramlab.read_report`, without importing transformers before they are called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from cramlab.consolidation.folder import Report


def load(model: str | nn.Module, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """A pretrained model with what `cramlab consolidate` wrote into a folder; see `consolidation.folder.load`.

    Args:
        model: a name or folder that `cramlab consolidate` takes, or the loaded model itself.
        folder: that `cramlab consolidate` wrote.
        trust_remote_code: see `hf.loading.load`; of a loaded model it says nothing.
    """
    from cramlab.consolidation import folder as consolidation_folder
    from cramlab.hf.loading import load

    loaded = load(model, trust_remote_code=trust_remote_code).model if isinstance(model, str) else model
    return consolidation_folder.load(loaded, folder)


def read_report(model: nn.Module) -> Report:
    """Proof that a consolidation is live, and what has been read and skipped since it was loaded."""
    from cramlab.consolidation.folder import report

    return report(model)
