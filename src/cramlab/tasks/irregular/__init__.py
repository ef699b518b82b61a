"""Real irregular series: visits at any time, some values missing at each, a label to predict."""

from cramlab.tasks.irregular.series import DataError, IrregularData, Scaling, Series, collate, split_people
from cramlab.tasks.irregular.sources import SOURCES, load

__all__ = ["SOURCES", "DataError", "IrregularData", "Scaling", "Series", "collate", "load", "split_people"]
