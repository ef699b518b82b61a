"""The training loop, read from top to bottom. What happens at which step is decided in `schedule`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric

from cramlab import records
from cramlab.batch import Batch
from cramlab.config import to_dict
from cramlab.errors import CramlabError
from cramlab.files import DamagedFileError, only_process_in, watched, write_json
from cramlab.launch import launch
from cramlab.model import ModelOutput
from cramlab.objective import batch_terms
from cramlab.ranks import ALONE, Ranks
from cramlab.tasks.check import check_own_task
from cramlab.training import schedule
from cramlab.training.evaluate import evaluate, split_batches
from cramlab.training.folder import CHECKPOINT, CONFIG, RECORD, own_record, refuse_to_overwrite
from cramlab.training.machine import check_accelerator, check_model
from cramlab.training.progress import Clock, OnRow, Progress
from cramlab.training.record import answer_accuracy, read_quality, run_record
from cramlab.training.run import RunConfig
from cramlab.training.samples import record_samples
from cramlab.training.state import TrainingState


class RunFailedError(CramlabError, RuntimeError):
    """Training stopped because a loss, a gradient or a validation was not finite; the record says where."""


class Step(NamedTuple):
    """A training step whose gradients are computed and whose update is still to come.

    Attributes:
        drawn: this rank's rows of the batch on the CPU.
        batch: the same on the device.
        output: what the model returned.
        losses: terms of the objective by name.
        norm: norm of the gradient before clipping.
        n_tokens: tokens of the batch, without padding.
        n_reads: tokens scored against the buffer in both passes, mean over layers.
    """

    drawn: Batch
    batch: Batch
    output: ModelOutput
    losses: dict[str, float]
    norm: float
    n_tokens: int
    n_reads: float


def train(config: RunConfig, out: Path, *, resume: bool = False, progress: OnRow | None = None) -> dict[str, Any]:
    """Trains one model and writes `record.json`, `config.json` and `checkpoint.pt` under `out`.

    Args:
        config: the run.
        out: its folder.
        resume: continue from the checkpoint in `out`, if there is one. The loss curve is that of an uninterrupted run.
        progress: called with each new row of the series.

    Returns:
        The record.

    Raises:
        ConfigError: when the task breaks its contract, or this machine cannot train such a run; nothing is written.
        RunFailedError: when a loss term, the gradient or a validation is not finite; the record has been written.
        LostRankError: when a process of a run on several devices is killed.
        FileExistsError: when `out` holds another run, or this one and `resume` is false, or another process uses it.
        FileNotFoundError: when `out` is removed during training.
        DamagedFileError: when a file in `out` cannot be read, or belongs to another run.
    """
    check_model(config)
    check_accelerator(config.training)
    check_own_task(config.task, seed=config.seed)
    refuse_to_overwrite(config, out, resume=resume)
    with only_process_in(out) as still_held:
        if (out / RECORD).exists():
            record = own_record(out, config)
            if record["status"] == "finished":
                return record
        if config.training.devices == 1:
            return _train(config, out, resume=resume, on_row=progress, still_held=still_held)
        launch(
            _train_rank,
            {"config": config, "out": out.absolute(), "resume": resume},
            n_ranks=config.training.devices,
            name=config.name,
            on_message=progress,
        )
        return own_record(out, config)


def _train_rank(ranks: Ranks, on_row: OnRow, config: RunConfig, out: Path, *, resume: bool) -> None:
    """The body of a rank's process; the process that started it holds the folder."""
    with watched(out) as still_held:
        _train(config, out, resume=resume, on_row=on_row if ranks.first else None, still_held=still_held, ranks=ranks)


def _train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    on_row: OnRow | None,
    still_held: Callable[[], None],
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """The loop, in a folder that no other run uses. Of several ranks, the first writes. See `train`."""
    training = config.training
    torch.set_num_threads(training.n_threads)
    devices: Any = [ranks.index] if training.accelerator == "cuda" and ranks.n > 1 else 1
    fabric = Fabric(accelerator=training.accelerator, devices=devices, precision=training.precision)  # type: ignore[arg-type]
    state = _prepare(config, out, fabric, ranks, resume=resume)
    progress = state.progress
    clock = Clock(progress.elapsed_s)

    while not schedule.finished(config, progress):
        stage, phase = schedule.stage(config, progress), schedule.phase(progress)
        learning_rate = schedule.learning_rate(config, progress)
        state.set_learning_rate(learning_rate)
        step = _step(config, state, fabric)
        _stop_if_not_finite(config, state, step.losses | {"gradient": step.norm}, out, clock)
        state.update(step.drawn, step.output.traces)

        # Once in a while: validate, and let the result end phases, stages and the run.
        due = progress.step % training.eval_every_steps == 0 or schedule.finished(config, progress)
        if not due and progress.step % training.log_every_steps:
            continue
        row: dict[str, Any] = {
            "step": progress.step,
            "n_tokens": progress.n_tokens,
            "seq_len": config.task_at(stage).seq_len,
            "phase": phase,
            "cooling_down": progress.cooldown_from_step is not None,
            "learning_rate": learning_rate,
            "loss": step.losses,
            "train_retrieval_acc": answer_accuracy(step.output, step.batch, ranks),
            "train_reads_frac": step.n_reads / step.n_tokens,
            "quality": read_quality(step.output, step.batch, ranks),
            "validation": None,
        }
        if due:
            data = split_batches(config, "validation", config.task_at(stage).seq_len)
            evaluation = ranks.from_first(lambda data=data: evaluate(state.averaged, data, read_all=progress.encoding))
            schedule.after_validation(config, progress, evaluation)
            row["validation"] = evaluation.metrics()
            if evaluation.scores.n_levels:
                error = {"validation dynamics": evaluation.scores.dynamics_mse}
                _stop_if_not_finite(config, state, error, out, clock)
        progress.series.append(row)
        if on_row is not None:
            on_row(row | _shown(config, progress, clock))
        if due:
            progress.elapsed_s = clock.seconds()
            if ranks.first:
                still_held()
                state.save(config, out)

    if not ranks.first:
        return {}
    record = _report(config, state, clock)
    still_held()
    write_json(out / CONFIG, to_dict(config))
    return records.write(out / RECORD, record)


def _prepare(config: RunConfig, out: Path, fabric: Fabric, ranks: Ranks, *, resume: bool) -> TrainingState:
    """The state to begin with, fresh or from the checkpoint; writes the config.

    The config of a run that an earlier version began stays until the end, as its checkpoint holds that config's hash.
    """
    state = TrainingState.fresh(config, out, fabric, ranks)
    if resume and (out / CHECKPOINT).exists():
        try:
            state.restore(config, out)
        except DamagedFileError as error:
            message = str(error).replace(f"{out}/", "")
            failure = {"step": 0, "term": CHECKPOINT, "seed": config.seed, "message": message}
            if ranks.first:
                records.write(out / RECORD, run_record(config, state.progress, Clock(0.0), failure=failure))
            raise
    if ranks.first and not (out / CONFIG).exists():
        write_json(out / CONFIG, to_dict(config))
    state.model.train()
    return state


def _step(config: RunConfig, state: TrainingState, fabric: Fabric) -> Step:
    """Draws a batch, sums the terms of the objective, computes and clips the gradient, and counts."""
    training, progress, ranks = config.training, state.progress, state.ranks
    drawn, n_rows = schedule.training_batch(config, progress, ranks), schedule.stage(config, progress).batch_size
    progress.n_sequences += n_rows
    batch = drawn.to(fabric.device)
    layer = schedule.counterfactual_layer(config, progress)
    ramp = schedule.price_ramp(config, progress)
    with ranks.batch(n_rows):
        routing = schedule.routing(config, progress, batch)
        output = state.model(batch, routing=routing, counterfactual_layer=layer, only_asked=True)
        terms = batch_terms(output, batch, training.loss, layer=layer, price_ramp=ramp)
    progress.step += 1
    progress.stage_step += 1
    losses = torch.stack(list(terms.values()))
    norm = state.backward(fabric, losses.sum(), training.grad_clip)
    # All numbers are fetched from the device at once, since each fetch waits for the device.
    traces = output.traces + output.counterfactual_traces
    n_scored = (torch.stack([trace.scored for trace in traces]) & batch.valid).sum()
    here = torch.cat([t.detach().double().view(-1) for t in (losses, n_scored)])
    if ranks.n > 1:
        here = ranks.sum(torch.cat([here, here.new_tensor([drawn.n_tokens])]))
    *numbers, total_norm = torch.cat([here, norm.detach().double().view(-1)]).tolist()
    values = [total / ranks.n for total in numbers[: len(terms)]]
    n_reads = numbers[len(terms)] / config.model.n_layers
    n_tokens = drawn.n_tokens if ranks.n == 1 else int(numbers[-1])
    progress.n_tokens += n_tokens
    progress.n_reads += n_reads
    return Step(drawn, batch, output, dict(zip(terms, values, strict=True)), total_norm, n_tokens, n_reads)


def _shown(config: RunConfig, progress: Progress, clock: Clock) -> dict[str, Any]:
    """What a display needs besides a row of the series."""
    return {
        "elapsed_s": clock.seconds(),
        "max_steps": config.training.max_steps,
        "name": config.name,
        "last": schedule.finished(config, progress),
    }


def _report(config: RunConfig, state: TrainingState, clock: Clock) -> dict[str, Any]:
    """Measures the finished model on the test split and returns the record."""
    training = config.training
    test = evaluate(state.averaged, split_batches(config, "test")) if training.n_test_tokens else None
    elsewhere = {str(n): evaluate(state.averaged, split_batches(config, "test", n)) for n in training.test_seq_lens}
    samples = record_samples(state.averaged, config.task, seed=config.seed) if test else []
    n_parameters = sum(p.numel() for p in state.plain.parameters())
    record = run_record(config, state.progress, clock, test=test) | {"samples": samples, "n_parameters": n_parameters}
    record["metrics"]["test_at"] = {seq_len: evaluation.metrics() for seq_len, evaluation in elsewhere.items()}
    record["practice"] = state.practice.record()
    return record


def _stop_if_not_finite(
    config: RunConfig, state: TrainingState, terms: dict[str, float], out: Path, clock: Clock
) -> None:
    """Writes a valid record that names step, term and seed, then raises `RunFailedError`, on all ranks alike."""
    progress = state.progress
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if not bad:
        return
    failure = {"step": progress.step, "term": bad[0], "seed": config.seed}
    message = f"term {bad[0]!r} is not finite at step {progress.step} with seed {config.seed}"
    if state.ranks.first:
        records.write(out / RECORD, run_record(config, progress, clock, failure=failure | {"message": message}))
    raise RunFailedError(f"{message}; try a lower training.learning_rate. The record is in {out / RECORD}")
