"""The schedule of a run: data, routing and learning rate of each step, and the consequences of a validation.

All functions but `after_validation` only read the progress.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cramlab.batch import Batch
from cramlab.mixer import Routing
from cramlab.ranks import ALONE, Ranks, draw_rows
from cramlab.training.evaluate import Evaluation
from cramlab.training.progress import Progress
from cramlab.training.run import RunConfig, Stage

# Smallest improvement that counts: absolute for retrieval, relative for the two that should fall.
_MARGINS = {"retrieval_acc": 0.001, "dynamics_mse": 0.01, "attention_frac": 0.02}


def finished(config: RunConfig, progress: Progress) -> bool:
    """Whether the run is over: cooled down, or out of steps."""
    training, begun = config.training, progress.cooldown_from_step
    cooled_down = begun is not None and progress.step >= begun + training.cooldown_steps
    return cooled_down or progress.step >= training.max_steps


def stage(config: RunConfig, progress: Progress) -> Stage:
    """The current stage of the curriculum."""
    return config.training.stages[progress.stage]


def phase(progress: Progress) -> str:
    """The name of the current phase, as the record has it."""
    return "encoding" if progress.encoding else "routed"


def learning_rate(config: RunConfig, progress: Progress) -> float:
    """Warm-up, constant, then a linear fall to zero once the cool-down has begun or the steps run out."""
    training, step = config.training, progress.step
    left = training.max_steps - step
    if progress.cooldown_from_step is not None:
        left = min(left, progress.cooldown_from_step + training.cooldown_steps - step)
    warm = min(1.0, (step + 1) / max(training.warmup_steps, 1))
    cool = min(1.0, left / max(training.cooldown_steps, 1))
    return training.learning_rate * warm * cool


def training_batch(config: RunConfig, progress: Progress, ranks: Ranks = ALONE) -> Batch:
    """A rank's rows of the next batch at the stage's length, on the CPU.

    They depend on the config, `progress.n_sequences` and the rank alone.
    """
    now = stage(config, progress)
    rows = ranks.rows(now.batch_size)
    data = config.task_at(now).dataset(seed=config.seed, split="train", batch_size=len(rows))
    return data.batch(progress.n_sequences + rows.start)


def routing(config: RunConfig, progress: Progress, batch: Batch) -> Routing:
    """Every token reads while encoding; afterwards the router chooses, and a random audit checks its choices."""
    generator = torch.Generator(device=batch.gaps.device)
    generator.manual_seed(config.seed * 1_000_003 + progress.step)
    if progress.encoding:
        return Routing(read_all=True, generator=generator, oracle_reads=batch.oracle_reads)
    share = torch.where(batch.retrieval_mask, config.training.audit_supervised_frac, config.training.audit_frac)
    return Routing(
        audits=draw_rows(lambda rows: torch.rand(rows, generator=generator, device=share.device), share.shape) < share,
        temperature=config.training.temperature,
        oracle_reads=batch.oracle_reads,
        generator=generator,
    )


def counterfactual_layer(config: RunConfig, progress: Progress) -> int:
    """The layer that a second pass runs without reads; layers take turns."""
    return progress.step % config.model.n_layers


def price_ramp(config: RunConfig, progress: Progress) -> float:
    """Share of the prices of Eq. 8 that applies, 0 to 1: none while encoding, then a linear rise."""
    if progress.encoding_ended_step is None:
        return 0.0
    return min(1.0, (progress.step - progress.encoding_ended_step) / max(config.training.price_ramp_steps, 1))


def after_validation(config: RunConfig, progress: Progress, evaluation: Evaluation) -> None:
    """Stores the metrics of a validation; if they meet a criterion, ends phase or stage or begins the cool-down."""
    training, now, metrics = config.training, stage(config, progress), evaluation.metrics()
    progress.validation = metrics
    if progress.encoding_attention_frac is None:
        progress.encoding_attention_frac = evaluation.use.fracs()["attention_frac"]
    retrieval_acc = evaluation.scores.retrieval_acc()
    # A mixer that reads nothing even in the encoding phase has nothing to wait for.
    if progress.encoding and (retrieval_acc >= training.encoding_target or metrics["reads_frac"] == 0):
        progress.encoding, progress.encoding_ended_step = False, progress.step
        progress.best, progress.evals_since_best = {}, 0
    last = progress.stage == len(training.stages) - 1
    arrived = now.until is not None and not progress.encoding and retrieval_acc >= now.until
    if not last and (arrived or progress.stage_step >= now.max_steps):
        progress.stage += 1
        progress.stage_step = 0
    elif last:
        _watch_for_the_end(config, progress, metrics)


def _watch_for_the_end(config: RunConfig, progress: Progress, metrics: dict[str, Any]) -> None:
    """Begins the cool-down when no watched metric has improved for `patience_evals` validations."""
    improved = False
    for name, margin in _MARGINS.items():
        value = metrics[name]
        if value is None:
            continue
        if name == "retrieval_acc":
            better = value > progress.best.get(name, -math.inf) + margin
        else:
            better = value < progress.best.get(name, math.inf) * (1 - margin)
        if better:
            progress.best[name] = value
            improved = True
    progress.evals_since_best = 0 if improved else progress.evals_since_best + 1
    training = config.training
    # Closer to the step limit than the cool-down is long, the rate is falling already and the limit ends the run.
    in_time = progress.step + training.cooldown_steps <= training.max_steps
    if progress.evals_since_best >= training.patience_evals and progress.cooldown_from_step is None and in_time:
        progress.cooldown_from_step = progress.step
