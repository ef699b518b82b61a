"""Trains and measures one model on irregular series. The weights with the lowest validation loss are kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.batch import Batch
from cramlab.catalog import MIXERS
from cramlab.config import (
    ConfigError,
    Count,
    CountOrZero,
    Positive,
    Share,
    Size,
    Threads,
    Weight,
    checked,
    nearest,
    to_dict,
)
from cramlab.metrics import AttentionUse, attention_use
from cramlab.mixer import Routing
from cramlab.model import ModelConfig, SequenceModel
from cramlab.objective import LossConfig, batch_terms, task_loss, token_losses
from cramlab.ranking import average_precision, interval, roc_auc
from cramlab.tasks.irregular import IrregularData, Scaling, Series, check_splits, collate
from cramlab.training.loop import RunFailedError

MODELS = ("cram", "transformer", "recurrence", "seqboat")


@checked("fit")
class FitConfig:
    """Training settings, the same for every model.

    Attributes:
        d_model: width of the model.
        d_mlp: hidden width of the MLP.
        batch_size: series per step.
        learning_rate: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        max_epochs: largest number of epochs.
        patience_epochs: epochs without a lower validation loss after which training ends.
        encoding_epochs: epochs of the encoding phase, in which every visit is forced to read.
        audit_frac: share of visits that are forced to read in training after the encoding phase.
        audit_labels: whether visits with a label are always forced to read in training.
        forecast_weight: weight of the squared error of the next value; the label's loss in nats has weight 1.
        n_threads: number of CPU threads.
    """

    d_model: Size = 64
    d_mlp: Size = 128
    batch_size: Size = 64
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 0.05
    max_epochs: Count = 40
    patience_epochs: Count = 6
    encoding_epochs: CountOrZero = 4
    audit_frac: Share = 0.2
    audit_labels: bool = True
    forecast_weight: Weight = 0.5
    n_threads: Threads = 1

    def __post_init__(self) -> None:
        """Raises ConfigError when the encoding phase takes all epochs."""
        if self.max_epochs <= self.encoding_epochs:
            raise ConfigError(
                f"fit.max_epochs = {self.max_epochs} must exceed fit.encoding_epochs = {self.encoding_epochs}, "
                "in which no weights are kept; raise max_epochs"
            )


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of a model that is not trained from scratch.

    Attributes:
        model: the model's config.
        prepare: changes the newly built model in place: loads weights, freezes some.
    """

    model: ModelConfig
    prepare: Callable[[SequenceModel], None]


def fresh_config(mixer: str, config: FitConfig) -> ModelConfig:
    """Returns the config of a model with this mixer and the width of `config`.

    Raises:
        ConfigError: when the mixer is unknown.
    """
    if mixer not in MIXERS:
        raise ConfigError(f'mixer "{mixer}" is unknown{nearest(mixer, MIXERS)}')
    return ModelConfig(mixer=MIXERS[mixer](), d_model=config.d_model, d_mlp=config.d_mlp)


def fit(
    data: IrregularData, splits: dict[str, list[Series]], mixer: str, config: FitConfig, seed: int,
    start: Start | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains one model. Validation selects the epoch; the test split is used once, at the end.

    Args:
        data: data set, which defines channels and classes.
        splits: "train", "validation" and "test", split by person.
        mixer: name of the mixer in the catalogue.
        config: training settings.
        seed: seed of the initial weights and of the order of batches.
        start: start of a model that is not trained from scratch; its config replaces `mixer`.

    Returns:
        `test` and `validation` metrics, `n_parameters`, `epochs`, `best_epoch`, `seconds`, `config`; `train_visits`
        and `train_reads`, the numbers of visits seen and read up to the best epoch.

    Raises:
        DataError: when a split has no labels to train or test on.
        RunFailedError: when no epoch gave a finite validation loss.
    """
    begin = time.perf_counter()
    check_splits(splits)
    model_config = fresh_config(mixer, config) if start is None else start.model
    torch.set_num_threads(config.n_threads)
    scaling = Scaling.of(splits["train"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SequenceModel(model_config, data.input_spec)
    if start is not None:
        start.prepare(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    # Every visit that reads also learns to do without its read, as in all records of these data.
    losses = LossConfig(dynamics_weight=config.forecast_weight, retrieval_emphasis=1.0, no_read_floor=1.0)
    batches = {name: _batches(data, splits[name], scaling, 256) for name in ("validation", "test")}
    rng = np.random.default_rng(seed)
    best, best_epoch, best_weights, epoch = np.inf, 0, copy.deepcopy(model.state_dict()), 0
    use, use_at_best = AttentionUse(), AttentionUse()
    for epoch in range(1, config.max_epochs + 1):
        encoding = epoch <= config.encoding_epochs
        use = use + _train_epoch(model, adamw, data, splits["train"], scaling, config, losses, rng, encoding)
        loss = _validation_loss(model, batches["validation"], losses, encoding)
        # Weights of the encoding phase are not kept: there every visit is forced to read.
        if not encoding and loss < best:
            best, best_epoch, best_weights = loss, epoch, copy.deepcopy(model.state_dict())
            use_at_best = use
        if not encoding and epoch - max(best_epoch, config.encoding_epochs) >= config.patience_epochs:
            break
    if not best_epoch:
        raise RunFailedError(f"no epoch of {epoch} gave a finite validation loss; lower fit.learning_rate")
    model.load_state_dict(best_weights)
    return {
        "validation": measure(model, batches["validation"], data),
        "test": measure(model, batches["test"], data),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epoch,
        "best_epoch": best_epoch,
        "train_visits": use_at_best.n_tokens,
        "train_reads": round(use_at_best.scored),
        "seconds": time.perf_counter() - begin,
        "config": {"fit": to_dict(config), "model": to_dict(model_config)},
    }


def _batches(data: IrregularData, series: list[Series], scaling: Scaling, size: int) -> list[Batch]:
    return [collate(data, series[i : i + size], scaling) for i in range(0, len(series), size)]


def _train_epoch(
    model: SequenceModel, adamw: torch.optim.Optimizer, data: IrregularData, series: list[Series], scaling: Scaling,
    config: FitConfig, losses: LossConfig, rng: np.random.Generator, encoding: bool,
) -> AttentionUse:  # fmt: skip
    """Trains on batches of series of similar length, in random order; returns how attention was used."""
    model.train()
    use = AttentionUse()
    order = sorted(rng.permutation(len(series)), key=lambda i: len(series[i].times))
    groups = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    for group in rng.permutation(len(groups)):
        batch = collate(data, [series[i] for i in groups[group]], scaling)
        adamw.zero_grad()
        loss, read = training_loss(model, batch, config, losses, rng, encoding)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        use = use + read
    return use


def training_loss(
    model: SequenceModel, batch: Batch, config: FitConfig, losses: LossConfig, rng: np.random.Generator, encoding: bool
) -> tuple[Tensor, AttentionUse]:
    """The objective on a batch, scalar, and how attention was used."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    audits = torch.rand(batch.gaps.shape, generator=generator) < config.audit_frac
    audits = (audits | batch.retrieval_mask & config.audit_labels) & batch.valid
    routing = Routing(read_all=encoding, audits=None if encoding else audits, generator=generator)
    output = model(batch, routing=routing, counterfactual_layer=0)
    loss = sum(batch_terms(output, batch, losses, layer=0).values(), torch.zeros(()))
    return loss, attention_use(output.traces, batch.valid)


@torch.no_grad()
def _validation_loss(model: SequenceModel, batches: list[Batch], losses: LossConfig, encoding: bool) -> float:
    model.eval()
    found = []
    for batch in batches:
        output = model(batch, routing=Routing(read_all=encoding))
        weight = int(batch.retrieval_mask.sum())
        found.append((float(task_loss(token_losses(output.predictions, batch), losses)) * weight, weight))
    return sum(value for value, _ in found) / max(sum(weight for _, weight in found), 1)


@torch.no_grad()
def measure(model: SequenceModel, batches: list[Batch], data: IrregularData) -> dict[str, float | int | str | None]:
    """Measures labels, forecasts and the share of visits that attend, under the routing rule of decoding."""
    model.eval()
    use, probabilities, labels, errors, still = AttentionUse(), [], [], [], []
    for batch in batches:
        output = model(batch, routing=Routing(generator=torch.Generator().manual_seed(0)))
        use = use + attention_use(output.traces, batch.valid)
        probabilities.append(F.softmax(output.predictions.logits[batch.retrieval_mask], dim=-1).double())
        labels.append(batch.retrieval_target[batch.retrieval_mask])
        where = batch.dynamics_mask
        errors.append((output.predictions.level[where] - batch.dynamics_target[where]).double().square())
        still.append((batch.continuous[..., 0][where] - batch.dynamics_target[where]).double().square())
    found = label_metrics(torch.cat(probabilities).numpy(), torch.cat(labels).numpy(), data.n_classes)
    error, as_before = torch.cat(errors), torch.cat(still)
    ratio = float(error.mean() / as_before.mean()) if len(error) and float(as_before.mean()) else None
    return found | use.fracs() | {"n_tokens": use.n_tokens, "forecast_skill_ratio": ratio, "n_forecasts": len(error)}


def label_metrics(probabilities: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, float | int | str | None]:
    """Returns accuracy and, for two classes, AUC with its interval and average precision.

    Args:
        probabilities: predicted probabilities (N, n_classes), finite.
        labels: classes (N,), N >= 1.
        n_classes: number of classes.

    Returns:
        The metrics; where AUC and average precision are None, `auc_undefined` gives the reason.

    Raises:
        ValueError: when there is no label or a probability is not finite.
    """
    if not len(labels) or not np.isfinite(probabilities).all():
        raise ValueError(f"cannot score {len(labels)} labels; give at least one label, and finite probabilities")
    found: dict[str, float | int | str | None] = {
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "n_labels": len(labels),
        "n_positive": int((labels == 1).sum()),
        "auc": None,
        "auc_low": None,
        "auc_high": None,
        "average_precision": None,
    }
    if n_classes != 2:
        return found | {"auc_undefined": f"there are {n_classes} classes"}
    if len(np.unique(labels)) == 1:
        return found | {"auc_undefined": f"all {len(labels)} labels are {labels[0]}"}
    scores = probabilities[:, 1]
    low, high = interval(roc_auc, scores, labels)
    return found | {"auc": roc_auc(scores, labels), "auc_low": low, "auc_high": high,
                    "average_precision": average_precision(scores, labels)}  # fmt: skip
