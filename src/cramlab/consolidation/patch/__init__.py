"""Patching a pretrained model: attention in two parts, executed as a rule decides, and restored bit by bit.

`far_reads` holds the abstract rule, `calls` executes it on `reads`, `install` puts rules into a model and removes them.
`sites` says which layers of a model can be patched: `look` watches the original, `prove` compares a patch with it.
"""

from cramlab.consolidation.patch.counts import Counts
from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen
from cramlab.consolidation.patch.install import closed, consolidatable_sites, install, installed, patched, remove
from cramlab.consolidation.patch.sites import left_alone

__all__ = [
    "Counts",
    "Decision",
    "FarReads",
    "Seen",
    "closed",
    "consolidatable_sites",
    "install",
    "installed",
    "left_alone",
    "patched",
    "remove",
]
