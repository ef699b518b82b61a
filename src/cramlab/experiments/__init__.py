"""Experiments: functions that yield the runs behind a table or figure."""

from __future__ import annotations

from cramlab.experiments.bounds import bounds
from cramlab.experiments.recall import mqar
from cramlab.experiments.srcd import srcd, srcd_deep, srcd_routers
from cramlab.experiments.srcd_sweeps import srcd_sweeps
from cramlab.experiments.srcd_table import srcd_table
from cramlab.experiments.study import Experiment, Study
from cramlab.experiments.transfer import transfer
from cramlab.experiments.transition import transition

EXPERIMENTS: dict[str, Experiment] = {
    "srcd": srcd,
    "srcd_routers": srcd_routers,
    "srcd_deep": srcd_deep,
    "srcd_table": srcd_table,
    "srcd_sweeps": srcd_sweeps,
    "transition": transition,
    "bounds": bounds,
    "transfer": transfer,
    "mqar": mqar,
}
__all__ = ["EXPERIMENTS", "Experiment", "Study"]
