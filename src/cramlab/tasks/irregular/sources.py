"""The data sets that a command can name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cramlab.tasks.irregular.mimic3 import mimic3
from cramlab.tasks.irregular.person_activity import person_activity
from cramlab.tasks.irregular.physionet2012 import physionet2012
from cramlab.tasks.irregular.series import DataError, IrregularData
from cramlab.tasks.irregular.survival import nafld2, pbcseq

SOURCES: dict[str, Callable[[Path | None], IrregularData]] = {
    "pbcseq": pbcseq,
    "nafld2": nafld2,
    "physionet2012": physionet2012,
    "mimic3": mimic3,
    "person-activity": person_activity,
}


def load(name: str, path: Path | None) -> IrregularData:
    """Loads a data set by name.

    Args:
        name: a key of `SOURCES`.
        path: folder or file that the user provides; for packaged tables None, or a folder with them.

    Raises:
        DataError: when the name is unknown, or a file is missing or malformed.
    """
    if name not in SOURCES:
        raise DataError(f'data set "{name}" is unknown; known: {", ".join(SOURCES)}')
    return SOURCES[name](path)
