"""Audits the checkpoints of a training run: does redundancy fall during training (claim C2)?"""

from __future__ import annotations

import dataclasses
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
from cramlab.auditing.result import AuditResult
from cramlab.auditing.run import audit
from cramlab.auditing.schemas import validate
from cramlab.config import to_dict
from cramlab.errors import AuditError
from cramlab.files import refuse_changed, write_json
from cramlab.hf.loading import Pretrained, load
from cramlab.text import Corpus

KIND, SCHEMA_VERSION = "over_training", 1
FILE = "over_training.json"
STEP_FILE = "step.json"


@dataclasses.dataclass(frozen=True, order=True)
class Checkpoint:
    """A saved model.

    Attributes:
        run: name of its run, the folder above its own.
        step: training step.
        folder: folder of the model.
    """

    run: str
    step: int
    folder: Path


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Finds the models saved under a folder, sorted by run and step; the step is the number that ends a folder's name.

    Raises:
        AuditError: when there is none.
    """
    found = []
    for config in sorted(folder.rglob("config.json")):
        step = re.search(r"(\d+)$", config.parent.name)
        if step is not None:
            run = config.parent.parent.relative_to(folder) if config.parent != folder else Path()
            found.append(Checkpoint(run.as_posix() if run.parts else folder.name, int(step[1]), config.parent))
    if not found:
        raise AuditError(
            f"--checkpoints {folder} holds no saved models; give a folder with subfolders such as step-1000, each "
            "with config.json, weights and tokenizer"
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
    """Audits every checkpoint on the same documents with the same split.

    Args:
        checkpoints: as returned by `find_checkpoints`.
        corpus: text that the models were not trained on.
        config: settings of every audit; a context longer than a model's is shortened.
        allow_pickle: as for `hf.loading.load`.
        device: device of the computation; None: the CPU.
        out: folder for finished audits, from which the same call continues; None: nothing is kept.
        log: called with one line per checkpoint.

    Returns:
        The document, which meets `over_training.schema.json`.

    Raises:
        FileExistsError: when a kept audit is of another model, text or config.
    """
    points, results = [], {}
    for checkpoint in checkpoints:
        pretrained = load(str(checkpoint.folder), allow_pickle=allow_pickle)
        pretrained.model.to(device)
        result = results[checkpoint] = _audited(checkpoint, pretrained, corpus, config, out)
        points.append(_point(checkpoint, result))
        if log is not None:
            r, r2 = ("-" if v is None else f"{v:.3f}" for v in (result.overall("r")[0], result.overall("r2")[0]))
            done = f"{len(points)} of {len(checkpoints)}"
            log(f"{checkpoint.run} step {checkpoint.step} ({done}): R {r}, centred R2 {r2}")
    last = results[checkpoints[-1]].data
    return records.finite(
        {name: last[name] for name in ("date", "revision", "versions", "hardware", "text", "config")}
        | {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "config": to_dict(config),
            "points": points,
            "trends": _trends(results, config),
        }
    )


def _audited(
    checkpoint: Checkpoint, pretrained: Pretrained, corpus: Corpus, config: AuditConfig, out: Path | None
) -> AuditResult:
    """Returns the audit of one checkpoint: the one kept in `out` or a new one, which is then kept there."""
    kept = None if out is None else out / checkpoint.run / f"audit-{checkpoint.step:08d}.json"
    work = None if kept is None else kept.with_suffix("")
    if kept is not None and kept.exists():
        result = AuditResult.read(kept)
        refuse_changed(kept, unlike(result, pretrained, corpus, config))
    else:
        fitting = sized(config, pretrained)
        result = audit(pretrained.model, tokenised(pretrained, corpus, fitting), fitting, out=work)
        name = f"{checkpoint.run}, step {checkpoint.step}"
        result = result.described({"name": name}, corpus.described()).rounded()  # equals what is read from a file
        if kept is not None:
            result.write(kept)
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return result


def _trends(results: dict[Checkpoint, AuditResult], config: AuditConfig) -> list[dict[str, Any]]:
    """Returns the trends of each run to its last checkpoint, from two starts.

    One start is the first trained checkpoint, at which attention may still return nearly a constant; the other is the
    first checkpoint after a tenth of the steps.
    """
    trends = []
    for run in sorted({checkpoint.run for checkpoint in results}):
        trained = [checkpoint for checkpoint in sorted(results) if checkpoint.run == run and checkpoint.step > 0]
        used = [checkpoint for checkpoint in trained if checkpoint.step >= trained[-1].step / 10]
        for first in sorted({*trained[:1], *used[:1]} - {*trained[-1:]}):
            last = trained[-1]
            trends.append(_trend(run, results[first], results[last], (first.step, last.step), config))
    return trends


def _point(checkpoint: Checkpoint, result: AuditResult) -> dict[str, Any]:
    """Returns the part of an audit that goes into the table over training."""
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
    """Returns the change of R and R^2 between two checkpoints, averaged over layers, paired by document."""
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
    """Returns R, squared error, that of the mean, and number of tokens; (documents, layers, 4)."""
    rows = result.data["by_document"]
    r, error, mean_error = (torch.tensor(rows[name], dtype=torch.float64) for name in ("r", "error", "mean_error"))
    tokens = torch.tensor(rows["tokens"], dtype=torch.float64)[:, None].expand_as(r)
    return torch.stack([r, error, mean_error, tokens], dim=-1)


def _direction(low: float, high: float) -> str:
    """Returns the direction of a change that its interval supports."""
    if low > 0:
        return "rises"
    return "falls" if high < 0 else "undecided"


def write(path: Path, data: dict[str, Any]) -> None:
    """Validates and writes the document, completely or not at all."""
    validate(data, KIND, SCHEMA_VERSION, str(path))
    write_json(path, data)


def read(path: Path) -> dict[str, Any]:
    """Reads a document that `write` wrote.

    Raises:
        RecordError: when the file is not such a document.
    """
    data = records.read_json(path)
    validate(data, KIND, SCHEMA_VERSION, str(path))
    return data
