"""Copies among documents, exact and near, so that what is split or promised counts independent ones.

Two contexts are copies when the Jaccard similarity of their shingles, all runs of 5 tokens, is 0.5 or more. MinHash
finds the candidates (Broder 1997; the library is datasketch), and each is then compared exactly, so a pair that is
called a copy is one.
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
_BANDS, _ROWS = 42, 3  # finds 99.6% of pairs at 0.5, and more the more alike they are
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Shingles = NDArray[np.uint64]


def shingles_of(tokens: Tensor) -> Shingles:
    """Hashes of all runs of `SHINGLE_TOKENS` tokens of a context (T,), each once, ascending; or of all its tokens."""
    ids = tokens.cpu().numpy().astype(np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(ids, min(SHINGLE_TOKENS, len(ids)))
    hashes = np.zeros(len(runs), dtype=np.uint64)
    for column in runs.T:  # wraps around, as a hash may
        hashes = (hashes ^ (column + np.uint64(1))) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def similarity(a: Shingles, b: Shingles) -> float:
    """The Jaccard similarity of two sets of shingles: those that both have over those that either has."""
    n_both = len(np.intersect1d(a, b, assume_unique=True))
    return n_both / (len(a) + len(b) - n_both)


class Originals:
    """The documents that have been taken so far, none of which is a copy of another.

    Attributes:
        n_copies: documents that were not taken, as a context of theirs is a copy of one that was.

    Raises:
        AuditError: when datasketch is missing.
    """

    def __init__(self) -> None:
        try:
            from datasketch import MinHashLSH  # here, as it comes with the extra "hf"
        except ImportError as error:
            raise AuditError('finding copies among documents needs datasketch; pip install "cramlab[hf]"') from error
        self.n_copies = 0
        self._taken: list[Shingles] = []
        self._index = MinHashLSH(num_perm=_N_PERMUTATIONS, params=(_BANDS, _ROWS))

    def take(self, *contexts: Tensor) -> bool:
        """Takes a document, given as its contexts (T,), unless it is a copy of one taken before; returns whether."""
        sketched = [_sketched(context) for context in contexts]
        if any(self._knows(*one) for one in sketched):
            self.n_copies += 1
            return False
        for shingles, sketch in sketched:
            self._index.insert(len(self._taken), sketch, check_duplication=False)
            self._taken.append(shingles)
        return True

    def knows(self, *contexts: Tensor) -> bool:
        """Whether any of these contexts is a copy of one that was taken."""
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
