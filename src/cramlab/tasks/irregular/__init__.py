"""Real irregular series: visits at any time, some values missing at each, a label to predict."""

from cramlab.tasks.irregular.series import DataError, IrregularData, Scaling, Series, collate
from cramlab.tasks.irregular.sources import SOURCES, load
from cramlab.tasks.irregular.splits import check_splits, split_people

__all__ = [
    "SOURCES",
    "DataError",
    "IrregularData",
    "Scaling",
    "Series",
    "check_splits",
    "collate",
    "load",
    "split_people",
]
