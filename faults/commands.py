"""Every command that writes, at a size that takes about a second, and the content of its folder without times."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from cramlab import records
from cramlab.cli import main as cli
from cramlab.files import load_checkpoint
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import prepare
from cramlab.language_model.training import run_text
from faults.cases import Answer, answer
from faults.material import CONTEXT, N_SINKS, WINDOW, fresh, model_folder, stays, texts

# Fields that may differ between two runs of the same work: times and memory.
UNEQUAL = {"seconds", "elapsed_s", "ms", "ms_per_step", "speedup", "repeats", "date", "peak_memory_bytes"}
REVISION = "0123abcd"  # in all records here: the campaign's own records change the state of the repository


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        name: as in the table.
        call: writes into the path, or continues there with `resume`. Returns the exit code.
        file: name of the path where it is a file; "": it is a folder.
    """

    name: str
    call: Callable[[Path, bool], int]
    file: str = ""

    def run(self, out: Path, *, resume: bool = False) -> Answer:
        """Calls the command with its output captured."""
        with mock.patch.object(records, "_revision", return_value=REVISION):
            return answer(lambda: self.call(out, resume))

    def fresh(self, name: str) -> Path:
        """A path to write to."""
        return fresh(name, self.file or "out")

    @functools.cached_property
    def finished(self) -> Path:
        """Path of the files that an undisturbed call writes."""
        out = self.fresh("finished")
        given = self.run(out)
        if given.code:
            raise RuntimeError(f"{self.name} does not even work undisturbed: {given.err.strip()}")
        return out

    @functools.cached_property
    def wanted(self) -> dict[str, Any]:
        """The contents of `finished`."""
        return contents(self.finished)


def command(name: str, *argv: object) -> Callable[[Path, bool], int]:
    """A subcommand of `cramlab` with these arguments."""
    return lambda out, resume: cli(
        [name, *map(str, argv), "--out", str(out), *(["--resume"] if resume and name != "report" else [])]
    )


def settings(**fields: object) -> list[str]:
    """Arguments that set fields."""
    return [f"--set={name.replace('__', '.')}={value}" for name, value in fields.items()]


RUN = settings(
    training__max_steps=6, training__eval_every_steps=2, training__n_validation_tokens=64, training__n_test_tokens=64
)
AUDIT = settings(
    context=32, fit_tokens=1000, validation_tokens=400, test_tokens=400, causal_tokens=64, n_bootstrap=3,
    contexts_per_document=2, strengths="0.1,1",
)  # fmt: skip
CONSOLIDATE = settings(
    window=WINDOW, n_sinks=N_SINKS, context=CONTEXT, fit_documents=6, sensitivity_documents=2, layers_per_document=1,
    gate_documents=3, validation_documents=3, calibration_documents=30, test_documents=3, tokens_per_document=32,
    local_steps=1, end_steps=1, max_rank=2, units=2, learning_contexts=4,
)  # fmt: skip
PRETRAIN = TextRunConfig(
    model="cram", vocab_size=300, context=32, n_layers=1, d_model=16, n_heads=2, batch_size=2, n_steps=4,
    first_checkpoint=4, n_checkpoints=1, warmup_steps=1,
)  # fmt: skip


def _pretrain(out: Path, resume: bool) -> int:  # noqa: ARG001
    """Trains a small model as `reproduction.protocols.pretrain_small` does; a finished run is kept."""
    documents = [(path.name, path.read_text(encoding="utf-8")) for path in sorted(texts().iterdir())]
    text = prepare(documents, out, PRETRAIN.vocab_size)
    run_text(PRETRAIN, text, out)  # keeps a finished run
    return 0


def _spoken(call: Callable[[Path, bool], int]) -> Callable[[Path, bool], int]:
    """Wraps a function as a command: a documented error or an OSError gives a line and exit code 1."""

    def spoken(out: Path, resume: bool) -> int:
        try:
            return call(out, resume)
        except OSError as error:
            print(f"cramlab: {error}", file=sys.stderr)
            return 1

    return spoken


def _undrawn(call: Callable[[Path, bool], int]) -> Callable[[Path, bool], int]:
    """A command with blank figures, because drawing takes most of its time, and `report` draws as well."""

    def undrawn(out: Path, resume: bool) -> int:
        with mock.patch.object(Figure, "savefig", lambda _, file, **__: file.write("<svg></svg>")):
            return call(out, resume)

    return undrawn


@_undrawn
def _consolidate(out: Path, resume: bool) -> int:
    return command("consolidate", model_folder(), "--text", texts(), "--max-loss-increase", 0.5, *CONSOLIDATE)(
        out, resume
    )


@_undrawn
def _audit(out: Path, resume: bool) -> int:
    return command("audit", model_folder(), "--text", texts(), "--other-text", "none", "--no-controls", *AUDIT)(
        out, resume
    )


@_undrawn
def _recalibrate(out: Path, resume: bool) -> int:
    start = WRITERS["consolidate"].finished
    return command("consolidate", model_folder(), "--text", texts(), "--from", start, "--max-loss-increase", 0.6)(
        out, resume
    )


def _irregular(out: Path, resume: bool) -> int:
    return command(
        "irregular", "--data", "physionet2012", "--path", stays(), "--models", "recurrence",
        "--seeds", 2,
    )(out, resume)  # fmt: skip


@_undrawn
def _over_training(out: Path, resume: bool) -> int:
    start = WRITERS["pretraining"].finished
    return command("audit", "--checkpoints", start, "--text", texts(), *AUDIT)(out, resume)


WRITERS: dict[str, Writer] = {
    writer.name: writer
    for writer in (
        Writer("run", command("run", "srcd/cram", "--size", "tiny", "--seed", 0, *RUN)),
        Writer("audit", _audit),
        Writer("audit --checkpoints", _over_training),
        Writer("consolidate", _consolidate),
        Writer("consolidate --from", _recalibrate),
        Writer("irregular", _irregular),
        Writer("report", lambda out, resume: command("report", WRITERS["run"].finished)(out, resume), file="page.html"),
        Writer("pretraining", _spoken(_pretrain)),
    )
}


def contents(out: Path) -> dict[str, Any]:
    """Every file below a path (or the path itself, a file), without times."""
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)) if path != out else "": content(path, alone=path == out) for path in files}


def content(path: Path, *, alone: bool = False) -> Any:
    """One file without times; of a page beside its record, only that it exists."""
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".pt":
        return _timeless(load_checkpoint(path))
    if path.suffix == ".safetensors":
        return _timeless(load_file(path))
    if path.suffix == ".html" and not alone:
        return "a page"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _timeless(item) for name, item in value.items() if name not in UNEQUAL}
    if isinstance(value, (list, tuple)):
        return [_timeless(item) for item in value]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(_bytes(value)).hexdigest()]
    return value


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Sequence[str]:
    """Names of the files that are missing, superfluous or different, each with the first field that differs."""
    return [_first_difference(name, found.get(name), wanted.get(name))
            for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]  # fmt: skip


def _first_difference(place: str, found: Any, wanted: Any) -> str:
    """The place of the first field that differs, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        name = next(name for name in found if found[name] != wanted[name])
        return _first_difference(f"{place}/{name}", found[name], wanted[name])
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        i = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        return _first_difference(f"{place}/{i}", found[i], wanted[i])
    return f"{place}: {str(found)[:40]}, not {str(wanted)[:40]}"
