"""Real irregular series: visits at any time, with missing values, and a label to predict.

`series` defines the data and `batches` what models see of them; `splits` divides people. Each data set has one file,
which reads its makers' format (with `text_tables`, `visits` and `packaged_tables`); to add one, name it in `sources`.
"""

from cramlab.tasks.irregular.batches import Scaling, collate
from cramlab.tasks.irregular.series import DataError, IrregularData, Series
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
