"""A study on irregular series: one document for each model and seed.

A finished document is kept when data, settings and source are those of the request: their digests are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.config import ConfigError, nearest, to_dict
from cramlab.files import only_process_in
from cramlab.tasks.irregular import IrregularData, check_splits, split_people
from cramlab.tasks.irregular.batches import VISITS_KEPT, cut_off
from cramlab.tasks.irregular.splits import SPLIT_SHARES
from cramlab.training.irregular import boosting, documents
from cramlab.training.irregular.fit import MODELS, FitConfig, fit, fresh_config
from cramlab.training.irregular.transfer import RATE_FROM, WAYS, Carried, begin

_NO_RATE = f'--ways: "random" reads as often as "{RATE_FROM}", whose document is missing; list "{RATE_FROM}" before it'


def chosen_kinds(carried: Carried | None, models: str | None, ways: str | None) -> list[str]:
    """Returns the models, or the ways of transferring one, that a comma-separated list names; None: all of them.

    Raises:
        ConfigError: when a name is unknown, or the list does not go with `carried`.
    """
    if carried is None:
        if ways is not None:
            raise ConfigError("--ways lists ways of transferring a model; give --source RUN as well")
        option, listed, known = "--models", models, (*MODELS, boosting.NAME)
    else:
        if models is not None:
            raise ConfigError(f"--models does not go with --source, whose model is {carried.mixer}; leave it out")
        option, listed, known = "--ways", ways, WAYS[carried.mixer]
    names = list(known) if listed is None else listed.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f'{option}: "{name}" is unknown{nearest(name, known)}')
    return names


@dataclass(frozen=True)
class Study:
    """A request on one data set.

    Attributes:
        data: the series.
        folder: folder of the documents, `KIND-seedN/irregular.json`.
        config: training settings of every model.
        carried: the model to be transferred; None: models are trained from scratch.
    """

    data: IrregularData
    folder: Path
    config: FitConfig
    carried: Carried | None = None

    def path(self, kind: str, seed: int) -> Path:
        """Returns the path of the document of a model, or of a way of transferring one."""
        name = kind if self.carried is None else f"{self.carried.mixer}-{kind}"
        return self.folder / f"{name}-seed{seed}" / documents.FILE

    @property
    def notes(self) -> list[str]:
        """Sentences on what was left out of the data, and on visits that models do not see."""
        notes = list(self.data.notes)
        cut = cut_off(self.data.series)
        if cut["n_series"]:
            notes.insert(
                0,
                f"{cut['n_series']:,} series are longer than the {VISITS_KEPT} visits that models see; their first "
                f"{cut['n_visits']:,} visits are cut off, with {cut['n_labels']:,} labels",
            )
        return notes

    def check(self, kinds: list[str], n_seeds: int, *, resume: bool = True) -> None:
        """Checks before any work that every document can be made or kept.

        Raises:
            DataError: when a split of a seed has no labels to train or test on.
            FileExistsError: when a document exists and `resume` is false, or it differs from the request.
            RecordError: when a document is damaged.
            ConfigError: when the rate of the random router would be unknown.
        """
        places = [self.path(kind, seed) for seed in range(n_seeds) for kind in kinds]
        if not resume and (existing := [path for path in places if path.exists()]):
            raise FileExistsError(f"{existing[0]} exists already; keep it with --resume, or choose another --out")
        for seed in range(n_seeds):
            rate_known = False
            for kind in kinds:
                held = self.held(kind, seed)
                rate_known = rate_known or kind == RATE_FROM
                if kind == "random" and held is None and not rate_known and self.held(RATE_FROM, seed) is None:
                    raise ConfigError(_NO_RATE)
                if held is None:
                    check_splits(split_people(self.data.series, seed))

    def held(self, kind: str, seed: int) -> dict[str, Any] | None:
        """Returns the finished document; None when there is none.

        Raises:
            FileExistsError: when its data or settings differ from the request.
            RecordError: when it is damaged or not such a document.
        """
        path = self.path(kind, seed)
        if not path.exists():
            return None
        document = documents.load(path)
        source = None if self.carried is None else self.carried.about()
        if changed := documents.unlike(document, self._head(kind, seed), source):
            raise FileExistsError(
                f"{path} belongs to another request (differs in {', '.join(changed)}); {documents.ADVICE}"
            )
        return document

    def run_all(self, kinds: list[str], n_seeds: int) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """Runs every kind with every seed; yields the folder's name, then the result of `run`."""
        for seed in range(n_seeds):
            for kind in kinds:
                yield self.path(kind, seed).parent.name, *self.run(kind, seed)

    def run(self, kind: str, seed: int) -> tuple[dict[str, Any], bool]:
        """Trains and writes one document unless it is finished; returns it and whether it was finished before.

        Raises:
            FileExistsError: when another process is making it, or a document of another request exists.
        """
        path = self.path(kind, seed)
        with only_process_in(path.parent) as still_held:
            if (held := self.held(kind, seed)) is not None:
                return held, True
            document = self._make(kind, seed)
            still_held()
            documents.write(path, document)
        return document, False

    def _make(self, kind: str, seed: int) -> dict[str, Any]:
        """Trains one model on the split of the seed."""
        splits = split_people(self.data.series, seed)
        if kind == boosting.NAME:
            findings = boosting.fit_boosting(self.data, splits, seed)
        elif self.carried is None:
            findings = fit(self.data, splits, kind, self.config, seed)
        else:
            start, config = begin(self.carried, kind, self.config, rate=self._rate(kind, seed))
            findings = fit(self.data, splits, self.carried.mixer, config, seed, start)
        head = self._head(kind, seed)
        head["data"] |= {
            "n_series": {name: len(series) for name, series in splits.items()},
            "notes": list(self.data.notes),
            "cut_off": None if kind == boosting.NAME else {"visits_kept": VISITS_KEPT} | cut_off(self.data.series),
        }
        head = records.header(torch.device("cpu")) | {"kind": documents.KIND, "version": documents.VERSION} | head
        if self.carried is not None:
            head["source"] = self.carried.about()
        return records.finite(head | findings)

    def _rate(self, kind: str, seed: int) -> float | None:
        """Returns the share of visits that the random router reads: the transferred router's, None for other kinds."""
        if kind != "random":
            return None
        if (held := self.held(RATE_FROM, seed)) is None:
            raise ConfigError(_NO_RATE)
        return held["test"]["attention_frac"]

    def _head(self, kind: str, seed: int) -> dict[str, Any]:
        """Returns the part of a document that describes its request."""
        about = {name: getattr(self.data, name) for name in ("name", "what", "origin")}
        about |= {name: list(getattr(self.data, name)) for name in ("channels", "statics")}
        asked = {"data_sha256": self._data_sha256, "settings": self._settings(kind)}
        if self.carried is None:
            return {"model": kind, "seed": seed, "data": about, "asked": asked}
        asked["source_sha256"] = self.carried.sha256
        return {"model": self.carried.mixer, "way": kind, "seed": seed, "data": about, "asked": asked}

    @functools.cached_property
    def _data_sha256(self) -> str:
        return self.data.digest()

    def _settings(self, kind: str) -> dict[str, Any]:
        if kind == boosting.NAME:
            settings: dict[str, Any] = boosting.TREES | {"depths": boosting.DEPTHS}
        elif self.carried is None:
            settings = {"fit": to_dict(self.config), "model": to_dict(fresh_config(kind, self.config))}
        else:
            start, config = begin(self.carried, kind, self.config)
            settings = {"fit": to_dict(config), "model": to_dict(start.model)}
        return records.finite(settings | {"visits_kept": VISITS_KEPT, "split_shares": SPLIT_SHARES})
