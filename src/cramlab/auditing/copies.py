"""Finds exact and near copies among documents, so that splits and guarantees rest on independent documents.

Two contexts are copies when the Jaccard similarity of their shingles, all runs of 5 tokens, is 0.5 or more. MinHash
finds candidates (Broder 1997, by the library datasketch), which are then compared exactly: there are no false copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cramlab.errors import AuditError

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_TOKENS = 5
SIMILARITY = 0.5
_N_PERMUTATIONS = 128
_BANDS, _ROWS = 42, 3  # find 99.6% of the pairs of similarity 0.5, and more at higher similarity
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Shingles = NDArray[np.uint64]


def shingles_of(tokens: Tensor) -> Shingles:
    """Returns sorted distinct hashes of all runs of `SHINGLE_TOKENS` tokens in a context (T,), or of its T tokens."""
    ids = tokens.cpu().numpy().astype(np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(ids, min(SHINGLE_TOKENS, len(ids)))
    hashes = np.zeros(len(runs), dtype=np.uint64)
    for column in runs.T:  # integer overflow is intended
        hashes = (hashes ^ (column + np.uint64(1))) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def similarity(a: Shingles, b: Shingles) -> float:
    """Returns the Jaccard similarity of two sets of shingles: the size of intersection over union."""
    n_both = len(np.intersect1d(a, b, assume_unique=True))
    return n_both / (len(a) + len(b) - n_both)


class Originals:
    """Documents added so far, none of which is a copy of another.

    Attributes:
        n_copies: number of documents that were rejected as copies.

    Raises:
        AuditError: when datasketch is not installed.
    """

    def __init__(self) -> None:
        try:
            from datasketch import MinHashLSH  # imported here, as only the extra "hf" installs it
        except ImportError as error:
            raise AuditError('finding copies among documents needs datasketch; pip install "cramlab[hf]"') from error
        self.n_copies = 0
        self._taken: list[Shingles] = []
        self._index = MinHashLSH(num_perm=_N_PERMUTATIONS, params=(_BANDS, _ROWS))

    def take(self, *contexts: Tensor) -> bool:
        """Adds a document, given as contexts (T,), unless one is a copy; returns whether it was added."""
        sketched = [_sketched(context) for context in contexts]
        if any(self._knows(*one) for one in sketched):
            self.n_copies += 1
            return False
        for shingles, sketch in sketched:
            self._index.insert(len(self._taken), sketch, check_duplication=False)
            self._taken.append(shingles)
        return True

    def knows(self, *contexts: Tensor) -> bool:
        """Returns whether any of these contexts is a copy of one added before."""
        return any(self._knows(*_sketched(context)) for context in contexts)

    def _knows(self, shingles: Shingles, sketch: MinHash) -> bool:
        candidates = cast("list[int]", self._index.query(sketch))
        return any(similarity(shingles, self._taken[i]) >= SIMILARITY for i in candidates)


def _sketched(context: Tensor) -> tuple[Shingles, MinHash]:
    from datasketch import MinHash

    shingles = shingles_of(context)
    sketch = MinHash(_N_PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
    sketch.update_batch((shingles >> np.uint64(32)).tolist())
    return shingles, sketch
