"""The audit of one model after another over its training: does redundancy fall (claim C2)?"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cramlab import records
from cramlab.auditing.bootstrap import Bootstrap
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.over_text import sized, tokenised, unlike
from cramlab.auditing.result import AuditResult, schema_error
from cramlab.auditing.run import audit
from cramlab.auditing.text import Corpus
from cramlab.config import to_dict
from cramlab.errors import AuditError
from cramlab.files import write_json
from cramlab.hf.loading import load

SCHEMA_VERSION = 1
FILE = "over_training.json"
STEP_FILE = "step.json"


@dataclasses.dataclass(frozen=True, order=True)
class Checkpoint:
    """A saved model: the run that it belongs to (the folder above its own), its step, its folder."""

    run: str
    step: int
    folder: Path


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Models saved under a folder, by run and step; the step is the number that ends a folder's name.

    Raises:
        AuditError: when there are none.
    """
    found = []
    for config in sorted(folder.rglob("config.json")):
        step = re.search(r"(\d+)$", config.parent.name)
        if step is not None:
            run = config.parent.parent.relative_to(folder) if config.parent != folder else Path()
            found.append(Checkpoint(run.as_posix() if run.parts else folder.name, int(step[1]), config.parent))
    if not found:
        raise AuditError(
            f"--checkpoints {folder} holds no saved models; give a folder with folders such as step-1000, each "
            "with a config.json, weights and a tokenizer"
        )
    return sorted(found)


def audit_checkpoints(
    checkpoints: list[Checkpoint],
    corpus: Corpus,
    config: AuditConfig,
    *,
    allow_pickle: bool = False,
    device: torch.device | None = None,
    out: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """One audit a checkpoint, all on the same documents and with the same split.

    Args:
        checkpoints: see `find_checkpoints`.
        corpus: text that the models were not trained on.
        config: of every audit; a context longer than a model's is shortened.
        allow_pickle: see `hf.loading.load`.
        device: where the models are run; None: the CPU.
        out: folder in which finished audits are kept, so that the same call goes on where it was cut off.
        log: called with a line a checkpoint.

    Returns:
        The document of `over_training.schema.json`.

    Raises:
        FileExistsError: when an audit that is kept there is one of another model, text or config.
    """
    points, results = [], {}
    for checkpoint in checkpoints:
        kept = None if out is None else out / checkpoint.run / f"audit-{checkpoint.step:08d}.json"
        work = None if kept is None else kept.with_suffix("")
        pretrained = load(str(checkpoint.folder), allow_pickle=allow_pickle)
        pretrained.model.to(device)
        if kept is not None and kept.exists():
            result = AuditResult.read(kept)
            if changed := unlike(result, pretrained, corpus, config):
                raise FileExistsError(
                    f"{kept} is an audit of another model, text or config ({', '.join(changed)}); choose another --out"
                )
        else:
            fitting = sized(config, pretrained)
            result = audit(pretrained.model, tokenised(pretrained, corpus, fitting), fitting, out=work)
            name = f"{checkpoint.run}, step {checkpoint.step}"
            result = result.described({"name": name}, corpus.described()).rounded()  # as one that is kept is read
            if kept is not None:
                result.write(kept)
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        points.append(_point(checkpoint, result))
        results[checkpoint] = result
        if log is not None:
            r, r2 = ("-" if v is None else f"{v:.3f}" for v in (result.overall("r")[0], result.overall("r2")[0]))
            done = f"{len(points)} of {len(checkpoints)}"
            log(f"{checkpoint.run} step {checkpoint.step} ({done}): R {r}, centred R2 {r2}")
    last = results[checkpoints[-1]].data
    return records.finite(
        {name: last[name] for name in ("date", "revision", "versions", "hardware", "text", "config")}
        | {
            "schema_version": SCHEMA_VERSION,
            "kind": "over_training",
            "config": to_dict(config),
            "points": points,
            "trends": _trends(results, config),
        }
    )


def _trends(results: dict[Checkpoint, AuditResult], config: AuditConfig) -> list[dict[str, Any]]:
    """Of each run, to its last checkpoint: from its first trained one, and from the first after a tenth of the steps.

    The very first finds attention that is not yet used and returns nearly a constant.
    """
    found = []
    for run in sorted({checkpoint.run for checkpoint in results}):
        trained = [checkpoint for checkpoint in sorted(results) if checkpoint.run == run and checkpoint.step > 0]
        used = [checkpoint for checkpoint in trained if checkpoint.step >= trained[-1].step / 10]
        for first in sorted({*trained[:1], *used[:1]} - {*trained[-1:]}):
            last = trained[-1]
            found.append(_trend(run, results[first], results[last], (first.step, last.step), config))
    return found


def _point(checkpoint: Checkpoint, result: AuditResult) -> dict[str, Any]:
    """What of an audit goes into the table over training."""
    own = checkpoint.folder / STEP_FILE
    loss = result.data["loss"]
    return {
        "run": checkpoint.run,
        "step": checkpoint.step,
        "training": records.read_json(own) if own.exists() else None,
        "overall": {probe: result.data["probes"][probe]["overall"] for probe in ("hidden", "mean", "token")},
        "layers": {probe: result.data["probes"][probe]["layers"] for probe in ("hidden", "mean")},
        "head_shares": result.data["head_shares"],
        "nats_per_token": None if loss is None else loss["nats_per_token"],
        "replaced": None if loss is None else {k: loss["cumulative"][-1][k] for k in ("probe", "mean", "zero")},
    }


def _trend(
    run: str, first: AuditResult, last: AuditResult, steps: tuple[int, int], config: AuditConfig
) -> dict[str, Any]:
    """How redundancy changes between two checkpoints, averaged over layers; documents are resampled in pairs."""
    sums = torch.stack([_by_document(result) for result in (first, last)], dim=1)  # (documents, 2, layers, 4)
    bootstrap = Bootstrap(len(sums), config.n_bootstrap, config.confidence, config.seed)

    def r(s: Tensor) -> Tensor:
        return (s[..., 0] / s[..., 3]).mean(dim=-1).diff(dim=-1)[..., 0]

    def r2(s: Tensor) -> Tensor:
        return (1 - s[..., 1] / s[..., 2]).mean(dim=-1).diff(dim=-1)[..., 0]

    found: dict[str, Any] = {"run": run, "from_step": steps[0], "to_step": steps[1]}
    for name, figure in (("r", r), ("r2", r2)):
        change = [float(value) for value in bootstrap(sums, figure).tolist()]
        found[name] = {"change": change, "direction": _direction(change[1], change[2])}
    return found


def _by_document(result: AuditResult) -> Tensor:
    """R, squared error, that of the mean, and tokens; (documents, layers, 4)."""
    rows = result.data["by_document"]
    r, error, mean_error = (torch.tensor(rows[name], dtype=torch.float64) for name in ("r", "error", "mean_error"))
    tokens = torch.tensor(rows["tokens"], dtype=torch.float64)[:, None].expand_as(r)
    return torch.stack([r, error, mean_error, tokens], dim=-1)


def _direction(low: float, high: float) -> str:
    """What an interval of a change leaves open."""
    if low > 0:
        return "rises"
    return "falls" if high < 0 else "undecided"


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of the document."""
    text = (
        importlib.resources.files("cramlab.auditing").joinpath("over_training.schema.json").read_text(encoding="utf-8")
    )
    return json.loads(text)


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes the validated document, whole or not at all."""
    validate(data, str(path))
    write_json(path, data)


def read(path: Path) -> dict[str, Any]:
    """Reads what `write` wrote; raises `RecordError` when it is something else."""
    data = records.read_json(path)
    validate(data, str(path))
    return data


def validate(data: Any, name: str) -> None:
    """Raises `RecordError` unless this is such a document."""
    schema_error(data, schema(), "over_training", SCHEMA_VERSION, name)
