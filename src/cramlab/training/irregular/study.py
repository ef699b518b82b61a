"""A study on irregular series: a document for each model and seed, and whether one that is there is the one asked for.

A document rests on the digest of the data, the settings of the model and the digest of a model that is carried over. It
counts as finished only if all of them are those of now. Documents written before it was so name their data by the hash
of the tables they come from.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.config import ConfigError, differing, to_dict
from cramlab.files import only_process_in, write_json
from cramlab.records import RecordError
from cramlab.tasks.irregular import IrregularData, check_splits, split_people
from cramlab.tasks.irregular.series import VISITS_KEPT, cut_off
from cramlab.tasks.irregular.splits import SPLIT_SHARES
from cramlab.training.irregular import boosting
from cramlab.training.irregular.fit import FitConfig, fit, fresh_config
from cramlab.training.irregular.transfer import RATE_FROM, Carried, begin

KIND, VERSION = "irregular", 1
FILE = "irregular.json"
_NO_RATE = f'--ways: "random" reads as often as "{RATE_FROM}" does; give that before it'
_WAY_OUT = "move it away and run again, or choose another --out"


@dataclass(frozen=True)
class Study:
    """What is asked of a data set.

    Attributes:
        data: the series.
        folder: where the documents go, `KIND-seedN/irregular.json`.
        config: how every model is trained.
        carried: the model to be carried over; None: models begin afresh.
    """

    data: IrregularData
    folder: Path
    config: FitConfig
    carried: Carried | None = None

    def path(self, kind: str, seed: int) -> Path:
        """Where the document of a model, or of a way of carrying one over, stands."""
        name = kind if self.carried is None else f"{self.carried.mixer}-{kind}"
        return self.folder / f"{name}-seed{seed}" / FILE

    def check(self, kinds: list[str], n_seeds: int) -> None:
        """Finds out before any work what would stop it.

        Raises:
            DataError: when a seed's splits cannot teach or test anything.
            FileExistsError: when a document is there that is not the one asked for.
            RecordError: when one is damaged.
            ConfigError: when the random router's rate would not be known.
        """
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
        """The finished document, None where there is none.

        Raises:
            FileExistsError: when it is of other data or settings.
            RecordError: when it is damaged or no such document.
        """
        path = self.path(kind, seed)
        if not path.exists():
            return None
        document = read(path)
        if changed := self._differs(document, self._head(kind, seed)):
            raise FileExistsError(f"{path} was made of something else (differs in {', '.join(changed)}); {_WAY_OUT}")
        return document

    def _differs(self, document: dict[str, Any], head: dict[str, Any]) -> list[str]:
        """The names of what a document rests on and that is another now."""
        names = ("model", "way", "seed", "asked")
        if "asked" in document:
            now = {name: head.get(name) for name in names} | {"data": head["data"]["name"]}
            held = {name: document.get(name) for name in names} | {"data": document["data"].get("name")}
            return [*differing(now, held)]
        # Without digests: what is said of the data, which has to include the hash of their tables, and of the settings.
        said = {"model": document["model"], "way": document.get("way"), "seed": document["seed"],
                "data": document["data"], "config": document["config"]}  # fmt: skip
        settings = head["asked"]["settings"]
        now = {name: head.get(name) for name in names[:3]} | {"data": head["data"], "config": settings}
        if self.carried is not None:
            said["source"], now["source"] = document.get("source"), self.carried.about()
        if document.get("way") == "random":  # its rate is none of the settings
            said["config"] = {"fit": said["config"].get("fit")}
        unknown = [] if "SHA-256" in str(said["data"].get("origin")) else ["data_sha256, of which it says nothing"]
        return [*differing(_part(said, now), _part(now, said)), *unknown]

    def run(self, kind: str, seed: int) -> tuple[dict[str, Any], bool]:
        """The document, made and written if it is not there yet, and whether it was.

        Raises:
            FileExistsError: when another process is making it, or one of something else is there.
        """
        path = self.path(kind, seed)
        with only_process_in(path.parent) as still_held:
            if (held := self.held(kind, seed)) is not None:
                return held, True
            document = self._make(kind, seed)
            still_held()
            write_json(path, document | {"sha256": _digest(document)})
        return document, False

    def _make(self, kind: str, seed: int) -> dict[str, Any]:
        """Trains one model on the seed's own split."""
        splits = split_people(self.data.series, seed)
        if kind == boosting.NAME:
            found = boosting.fit_boosting(self.data, splits, seed)
        elif self.carried is None:
            found = fit(self.data, splits, kind, self.config, seed)
        else:
            start, config = begin(self.carried, kind, self.config, rate=self._rate(kind, seed))
            found = fit(self.data, splits, self.carried.mixer, config, seed, start)
        head = self._head(kind, seed)
        head["data"] |= {
            "n_series": {name: len(series) for name, series in splits.items()},
            "notes": list(self.data.notes),
            "cut_off": None if kind == boosting.NAME else {"visits_kept": VISITS_KEPT} | cut_off(self.data.series),
        }
        head = records.header(torch.device("cpu")) | {"kind": KIND, "version": VERSION} | head
        if self.carried is not None:
            head["source"] = self.carried.about()
        return records.finite(head | found)

    def _rate(self, kind: str, seed: int) -> float | None:
        """How often the random router reads: as often as the carried one does."""
        if kind != "random":
            return None
        if (held := self.held(RATE_FROM, seed)) is None:
            raise ConfigError(_NO_RATE)
        return held["test"]["attention_frac"]

    def _head(self, kind: str, seed: int) -> dict[str, Any]:
        """What a document says of its question, and what it rests on."""
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


def _part(whole: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that the other one does not have."""
    return {
        name: _part(value, like[name]) if isinstance(value, dict) and isinstance(like[name], dict) else value
        for name, value in whole.items()
        if name in like
    }


def _digest(document: dict[str, Any]) -> str:
    """SHA-256 of a document's canonical JSON, without when it was made and how long that took."""
    rest = {name: value for name, value in document.items() if name not in ("date", "revision", "seconds", "elapsed_s")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """A document that is whole; without the digest that says so.

    Raises:
        RecordError: when it is cut, changed since it was written, or no document of this kind and version.
    """
    try:
        document = records.read_json(path)
    except (RecordError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is damaged ({error}); {_WAY_OUT}") from error
    fields = {"data": dict, "config": dict, "test": dict, "model": str, "seed": int}
    if not isinstance(document, dict) or document.get("kind") != KIND or document.get("version") != VERSION:
        raise RecordError(f"{path} is no document of version {VERSION} of `cramlab irregular`; {_WAY_OUT}")
    sealed = document.pop("sha256", None)
    whole = sealed == _digest(document) if "asked" in document or sealed is not None else True
    if not whole or any(not isinstance(document.get(name), kind) for name, kind in fields.items()):
        raise RecordError(f"{path} is damaged (its content is not what was written); {_WAY_OUT}")
    return document
