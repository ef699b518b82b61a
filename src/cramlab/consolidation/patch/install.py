"""Installing patches in a model: only at sites where a patch has been proven right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

from cramlab.consolidation.patch.attach import attach, closed, installation, installed, remove
from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.consolidation.patch.sites import consolidatable_sites
from cramlab.errors import ConsolidationError

__all__ = ["closed", "consolidatable_sites", "install", "installation", "installed", "patched", "remove"]


def install(
    model: nn.Module,
    layers: Mapping[int, FarReads],
    write: Callable[[nn.Module, Path], None] | None = None,
) -> None:
    """Installs patches; from then on new tokens are written into the cache in place.

    Args:
        model: a causal language model of transformers, with "sdpa" or "eager" attention.
        layers: patches by index of the block; a patch can be installed in one model at a time.
        write: see `Installation`.

    Raises:
        ConsolidationError: when the model is patched already, uses other attention, has no such site, or a patch was
            not proven right; see `consolidatable_sites`.
        UnknownFamilyError: when the attention of the model cannot be found.
    """
    if installed(model):
        raise ConsolidationError("the model is patched already; remove(model) first")
    sites = {site.layer: site for site in consolidatable_sites(model)}
    if not layers:
        raise ConsolidationError("layers = {}: no layer to patch is given; give at least one")
    if unknown := layers.keys() - sites.keys():
        raise ConsolidationError(f"layers {sorted(unknown)} have no far reads to skip; the model has {sorted(sites)}")
    if taken := [i for i, layer in layers.items() if layer.attached]:
        raise ConsolidationError(f"the patches of layers {taken} are installed in a model; remove them first")
    attach(model, layers, sites, write)


@contextlib.contextmanager
def patched(model: nn.Module, layers: Mapping[int, FarReads]) -> Iterator[None]:
    """While open, these patches are installed; see `install`."""
    install(model, layers)
    try:
        yield
    finally:
        remove(model)
