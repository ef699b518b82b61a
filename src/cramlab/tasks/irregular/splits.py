"""Splits by person into train, validation and test, and checks that a split can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cramlab.tasks.irregular.batches import VISITS_KEPT
from cramlab.tasks.irregular.series import DataError, Series

SPLIT_SHARES = (0.6, 0.2, 0.2)


def split_people(series: Sequence[Series], seed: int) -> dict[str, list[Series]]:
    """Splits series by person; each person's highest label has about the same frequency in every split.

    Raises:
        DataError: when there are too few people for three splits.
    """
    people: dict[str, list[Series]] = {}
    for one in series:
        people.setdefault(one.person, []).append(one)
    if len(people) < 5:
        raise DataError(f"{len(people)} people are too few for three splits; give at least 5")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(303,)))
    strata: dict[int, list[str]] = {}
    for person in sorted(people):
        strata.setdefault(max(int(one.labels.max()) for one in people[person]), []).append(person)
    ranked = []
    for names in strata.values():
        order = rng.permutation(len(names))
        ranked += [((rank + 0.5) / len(names), names[i]) for rank, i in enumerate(order)]
    ends = np.cumsum(SPLIT_SHARES)
    found: dict[str, list[Series]] = {"train": [], "validation": [], "test": []}
    for place, person in sorted(ranked):
        name = list(found)[int(np.searchsorted(ends[:-1], place, side="right"))]
        found[name] += people[person]
    if empty := [name for name, some in found.items() if not some]:
        raise DataError(f"{len(people)} people are too few: {' and '.join(empty)} would be empty; give more people")
    return found


def check_splits(splits: Mapping[str, Sequence[Series]]) -> None:
    """Checks that a model can be trained, selected and tested on splits.

    Args:
        splits: "train", "validation" and "test".

    Raises:
        DataError: when a split is missing, is empty or has no label in the visits that batches keep, a person is in two
            splits, or all training labels are of one class.
    """
    names = ("train", "validation", "test")
    if missing := [name for name in names if not splits.get(name)]:
        raise DataError(f"no series in {' and '.join(missing)}; give people for {', '.join(names)}")
    where: dict[str, str] = {}
    for name in names:
        if both := sorted({one.person for one in splits[name]} & where.keys()):
            raise DataError(f'person "{both[0]}" is in {where[both[0]]} and in {name}; split by person')
        where |= dict.fromkeys((one.person for one in splits[name]), name)
        classes = {int(label) for one in splits[name] for label in one.labels[-VISITS_KEPT:] if label >= 0}
        if not classes:
            raise DataError(f"nobody in {name} has a label in the last {VISITS_KEPT} visits; give labelled people")
        if name == "train" and len(classes) == 1:
            raise DataError(f"all training labels are {classes.pop()}; give people of at least two classes")
