"""One training loop, read from top to bottom: encode, then route; short sequences first, then long."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cramlab import records
from cramlab.batch import Batch
from cramlab.config import config_hash, to_dict
from cramlab.errors import CramlabError
from cramlab.files import DamagedFileError, only_process_in, save_checkpoint, write_json
from cramlab.metrics import consolidation_ratio
from cramlab.mixer import Routing
from cramlab.model import ModelOutput, SequenceModel
from cramlab.objective import gate_loss, task_loss, token_losses
from cramlab.training.evaluate import Evaluation, evaluate, split_batches
from cramlab.training.folder import (
    CHECKPOINT,
    CONFIG,
    RECORD,
    own_checkpoint,
    own_record,
    refuse_to_overwrite,
    restoring,
)
from cramlab.training.machine import check_accelerator, check_model
from cramlab.training.practice import PracticeLog
from cramlab.training.run import RunConfig, Stage, TrainingConfig
from cramlab.training.samples import record_samples
from cramlab.training.start import TransferConfig, start

Progress = Callable[[dict[str, Any]], None]


class RunFailedError(CramlabError, RuntimeError):
    """Training stopped on a loss, gradient or validation that is no number; the record says where."""


def new_progress(header: dict[str, Any], *, encoding: bool = True) -> dict[str, Any]:
    """All that changes in a run besides weights and optimiser; plain data, so that it can be saved and resumed."""
    return {
        "header": header,  # of code and machine, taken before the first step
        "step": 0,
        "stage": 0,
        "stage_step": 0,
        "n_sequences": 0,  # training sequences drawn so far
        "n_tokens": 0,  # training tokens seen so far
        "n_reads": 0.0,  # of which scored against the buffer
        "encoding": encoding,
        "encoding_ended_step": None if encoding else 0,
        "encoding_attention_frac": None,
        "best": {},  # best validation metrics of the last stage
        "evals_since_best": 0,
        "cooldown_from_step": None,
        "validation": None,
        "series": [],
        "elapsed_s": 0.0,
    }


def train(config: RunConfig, out: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Trains one model and writes `record.json`, `config.json` and `checkpoint.pt` under `out`.

    Args:
        config: the run.
        out: its folder.
        resume: continue from the checkpoint in `out`, if there is one; the loss curve is the one that an
            uninterrupted run would have had.
        progress: called with each new row of the series.

    Returns:
        The record.

    Raises:
        ConfigError: when this machine cannot train such a run; nothing has been written.
        RunFailedError: when a loss term, the gradient or a validation is not finite; the record has been written.
        FileExistsError: when `out` holds another run, or this one and `resume` is false, or is in use right now.
        FileNotFoundError: when `out` is removed meanwhile.
        DamagedFileError: when a file in `out` cannot be read, or is of another run.
    """
    check_model(config)
    check_accelerator(config.training)
    refuse_to_overwrite(config, out, resume=resume)
    with only_process_in(out) as still_held:
        if (out / RECORD).exists():
            record = own_record(out, to_dict(config))
            if record["status"] == "finished":
                return record
        return _train(config, out, resume=resume, progress=progress, still_held=still_held)


def _train(
    config: RunConfig, out: Path, *, resume: bool, progress: Progress | None, still_held: Callable[[], None]
) -> dict[str, Any]:
    """The loop, in a folder that is this process's own. See `train`."""
    training = config.training
    checkpoint = out / CHECKPOINT
    torch.set_num_threads(training.n_threads)
    fabric = Fabric(accelerator=training.accelerator, devices=1, precision=training.precision)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        plain = SequenceModel(config.model, config.task.input_spec)
    if isinstance(config, TransferConfig):
        start(config, plain, out)
    adamws = [
        torch.optim.AdamW(groups, weight_decay=training.weight_decay) for groups in _parameter_groups(plain, training)
    ]
    model, *optimizers = fabric.setup(plain, *adamws)
    # What is validated, tested and saved for use is an average of the newest weights, calmer than any of them.
    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(training.average_decay))
    averaged = fabric.setup_module(average.module, move_to_device=False)
    practice = PracticeLog(config.task.n_patterns)
    run = new_progress(records.header(fabric.device), encoding=training.encoding_target > 0)
    if resume and checkpoint.exists():
        with _recording_what_is_wrong(config, run, out), restoring(checkpoint):
            saved = own_checkpoint(out, to_dict(config))
            plain.load_state_dict(saved["model"])
            average.load_state_dict(saved["average"])
            practice.load(saved["practice"])
            for adamw, held in zip(adamws, saved["optimizers"], strict=True):
                adamw.load_state_dict(held)
            header = records.continued(saved["progress"]["header"], run["header"])
            run.update({name: saved["progress"][name] for name in run} | {"header": header})
    write_json(out / CONFIG, to_dict(config))
    model.train()
    clock = _Clock(run["elapsed_s"])

    while not _finished(config, run):
        stage = training.stages[run["stage"]]
        phase = "encoding" if run["encoding"] else "routed"
        learning_rate = _learning_rate(config, run)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate * group["rate"]

        # One step: draw a batch, sum the terms, stop on anything that is not a number, update. What must be known of a
        # step is fetched from the device at once: each fetch waits until it has caught up.
        drawn = _training_batch(config, stage, run)
        batch = drawn.to(fabric.device)
        routing = _training_routing(config, run, batch)
        output = model(batch, routing=routing, counterfactual_layer=_counterfactual_layer(config, run))
        terms = _loss_terms(config, run, output, batch)
        run["step"] += 1
        run["stage_step"] += 1
        losses = torch.stack(list(terms.values()))
        model.zero_grad()
        fabric.backward(losses.sum())
        norms = [
            fabric.clip_gradients(model, optimizer, max_norm=training.grad_clip, error_if_nonfinite=False)
            for optimizer in optimizers
        ]
        # Of parameters that are all frozen the norm is a zero on the CPU, wherever they are.
        norm = torch.stack([part.to(losses.device) for part in cast("list[Tensor]", norms)]).sum()
        numbers = torch.cat([t.detach().double().view(-1) for t in (losses, norm, _count_scored(output, batch))])
        *values, n_scored = numbers.tolist()
        n_tokens, n_reads = drawn.n_tokens, n_scored / config.model.n_layers
        run["n_tokens"] += n_tokens
        run["n_reads"] += n_reads
        _stop_if_not_finite(config, run, dict(zip([*terms, "gradient"], values, strict=True)), out, clock)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(plain)
        practice.update(drawn, output.traces)

        # Once in a while: validate, and let what it shows end phases, stages and the run.
        due = run["step"] % training.eval_every_steps == 0 or _finished(config, run)
        if not due and run["step"] % training.log_every_steps:
            continue
        row: dict[str, Any] = {
            "step": run["step"],
            "n_tokens": run["n_tokens"],
            "seq_len": config.task_at(stage).seq_len,
            "phase": phase,
            "cooling_down": run["cooldown_from_step"] is not None,
            "learning_rate": learning_rate,
            "loss": dict(zip(terms, values, strict=False)),  # the last value is the gradient's
            "train_retrieval_acc": _retrieval_acc(output, batch),
            "train_reads_frac": n_reads / n_tokens,
            "quality": _quality(output, batch),
            "validation": None,
        }
        if due:
            row["validation"] = _validate(config, run, averaged, stage)
            error = row["validation"]["dynamics_mse"]
            _stop_if_not_finite(config, run, {"validation dynamics": error}, out, clock)
        run["series"].append(row)
        if progress is not None:
            progress(
                row
                | {
                    "elapsed_s": clock.seconds(),
                    "max_steps": training.max_steps,
                    "name": config.name,
                    "last": _finished(config, run),
                }
            )
        if due:
            run["elapsed_s"] = clock.seconds()
            state = {
                "config_hash": config_hash(config),
                "seed": config.seed,
                "model": plain.state_dict(),
                "average": average.state_dict(),
                "practice": practice.state(),
                "optimizers": [adamw.state_dict() for adamw in adamws],
                "progress": run,
            }
            still_held()
            save_checkpoint(checkpoint, state)

    test = evaluate(averaged, split_batches(config, "test")) if training.n_test_tokens else None
    elsewhere = {str(n): evaluate(averaged, split_batches(config, "test", n)) for n in training.test_seq_lens}
    samples = record_samples(averaged, config.task, seed=config.seed) if test else []
    n_parameters = sum(p.numel() for p in plain.parameters())
    record = _record(config, run, clock, test=test) | {"samples": samples, "n_parameters": n_parameters}
    record["metrics"]["test_at"] = {seq_len: evaluation.metrics() for seq_len, evaluation in elsewhere.items()}
    record["practice"] = practice.record()
    still_held()
    return records.write(out / RECORD, record)


def _parameter_groups(model: SequenceModel, training: TrainingConfig) -> list[list[dict[str, Any]]]:
    """All parameters, in groups with a rate each; the gates that learn beside the model have an optimizer of their own.

    Their gradients are detached from everything else and several times as large; clipped together, how hard the gate's
    task is at a step would decide how much the rest of the model learns from it.
    """
    parts: dict[str, list[nn.Parameter]] = {"others": [], "semantic": [], "gates": []}
    for name, parameter in model.named_parameters():
        part = "gates" if ".gate." in name or ".salience." in name else "semantic" if ".semantic." in name else "others"
        parts[part].append(parameter)
    rates = {"others": 1.0, "semantic": training.semantic_rate}
    together = [{"params": parts[name], "rate": rate} for name, rate in rates.items() if parts[name]]
    return [together, [{"params": parts["gates"], "rate": 1.0}]] if parts["gates"] else [together]


class _Clock:
    """Seconds of work, also across a resume."""

    def __init__(self, before_s: float) -> None:
        self._start_s = time.perf_counter() - before_s

    def seconds(self) -> float:
        return time.perf_counter() - self._start_s


@contextlib.contextmanager
def _recording_what_is_wrong(config: RunConfig, run: dict[str, Any], out: Path) -> Iterator[None]:
    """Around the loading of a checkpoint: where it cannot be taken, the record says that the run could not go on."""
    try:
        yield
    except DamagedFileError as error:
        message = str(error).replace(f"{out}/", "")
        failure = {"step": 0, "term": CHECKPOINT, "seed": config.seed, "message": message}
        records.write(out / RECORD, _record(config, run, _Clock(0.0), failure=failure))
        raise


def _finished(config: RunConfig, run: dict[str, Any]) -> bool:
    cooled_down = run["cooldown_from_step"] is not None and (
        run["step"] >= run["cooldown_from_step"] + config.training.cooldown_steps
    )
    return cooled_down or run["step"] >= config.training.max_steps


def _learning_rate(config: RunConfig, run: dict[str, Any]) -> float:
    """Warm-up, constant, and a linear fall to zero once the cool-down has begun or the steps run out."""
    training, step = config.training, run["step"]
    left = training.max_steps - step
    if run["cooldown_from_step"] is not None:
        left = min(left, run["cooldown_from_step"] + training.cooldown_steps - step)
    warm = min(1.0, (step + 1) / max(training.warmup_steps, 1))
    cool = min(1.0, left / max(training.cooldown_steps, 1))
    return training.learning_rate * warm * cool


def _training_batch(config: RunConfig, stage: Stage, run: dict[str, Any]) -> Batch:
    """The next batch, at the stage's length; a function of the config and of how many sequences came before. On CPU."""
    start = run["n_sequences"]
    data = config.task_at(stage).dataset(seed=config.seed, split="train", batch_size=stage.batch_size)
    run["n_sequences"] += stage.batch_size
    return data.batch(start)


def _training_routing(config: RunConfig, run: dict[str, Any], batch: Batch) -> Routing:
    """Everything reads while encoding; afterwards the router's choice and a random audit of it."""
    generator = torch.Generator(device=batch.gaps.device)
    generator.manual_seed(config.seed * 1_000_003 + run["step"])
    if run["encoding"]:
        return Routing(read_all=True, generator=generator, oracle_reads=batch.oracle_reads)
    share = torch.where(batch.retrieval_mask, config.training.audit_supervised_frac, config.training.audit_frac)
    return Routing(
        audits=torch.rand(share.shape, generator=generator, device=share.device) < share,
        temperature=config.training.temperature,
        oracle_reads=batch.oracle_reads,
        generator=generator,
    )


def _counterfactual_layer(config: RunConfig, run: dict[str, Any]) -> int:
    """Layers take turns at going without their reads."""
    return run["step"] % config.model.n_layers


def _loss_terms(config: RunConfig, run: dict[str, Any], output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
    """The weighted terms of the objective, by name; a mixer contributes those that it has."""
    weights = config.training.loss
    losses = token_losses(output.predictions, batch)
    terms = {"task": task_loss(losses, batch, weights)}
    if "capacity" in output.aux:
        terms["capacity"] = weights.capacity_weight * output.aux["capacity"]
    if "consolidation" in output.aux:
        terms["consolidation"] = weights.consolidation_weight * output.aux["consolidation"]
    if "salience" in output.aux:
        terms["salience"] = weights.gate_weight * output.aux["salience"]
    if "episodic_use" in output.aux:
        ramp = _price_ramp(config, run)
        terms["episodic_price"] = ramp * weights.episodic_price * output.aux["episodic_use"]
        terms["semantic_reward"] = -ramp * weights.semantic_reward * output.aux["semantic_use"]
    elif output.without_reads is not None:
        trace = output.traces[_counterfactual_layer(config, run)]
        without = token_losses(output.without_reads, batch)
        # Only what may go without a read has to learn to: a novel query has no answer but the one that is read.
        goes_without = trace.attended * (1 - trace.gate_prob).clamp(min=weights.no_read_floor)
        terms["no_read"] = weights.no_read_weight * task_loss(without, batch, weights, goes_without)
        if trace.gate_logit is not None:
            terms["gate"] = weights.gate_weight * gate_loss(
                trace.gate_logit, losses, without, trace.attended, batch, weights
            )
    return terms


def _price_ramp(config: RunConfig, run: dict[str, Any]) -> float:
    if run["encoding"]:
        return 0.0
    return min(1.0, (run["step"] - run["encoding_ended_step"]) / max(config.training.price_ramp_steps, 1))


def _count_scored(output: ModelOutput, batch: Batch) -> Tensor:
    """Tokens scored in this step, summed over layers; second passes of upper layers included. Scalar."""
    traces = output.traces + output.counterfactual_traces
    return (torch.stack([trace.scored for trace in traces]) & batch.valid).sum()


def _retrieval_acc(output: ModelOutput, batch: Batch) -> float:
    hit = (output.predictions.logits.argmax(dim=-1) == batch.retrieval_target) & batch.retrieval_mask
    return int(hit.sum()) / max(int(batch.retrieval_mask.sum()), 1)


def _quality(output: ModelOutput, batch: Batch) -> float | None:
    """Mean q (Eq. 6) of the recurring queries that were read, over all layers that know it; None without any."""
    asked = (batch.pattern >= 0) & batch.valid
    known = [trace.quality.detach()[asked] for trace in output.traces if trace.quality is not None]
    read = torch.cat(known) if known else torch.empty(0)
    read = read[torch.isfinite(read)]
    return float(read.mean()) if len(read) else None


def _stop_if_not_finite(
    config: RunConfig, run: dict[str, Any], terms: dict[str, float], out: Path, clock: _Clock
) -> None:
    """Leaves a valid record that names step, term and seed, then raises."""
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if not bad:
        return
    failure = {"step": run["step"], "term": bad[0], "seed": config.seed}
    message = f"term {bad[0]!r} is not finite at step {run['step']} with seed {config.seed}"
    records.write(out / RECORD, _record(config, run, clock, failure=failure | {"message": message}))
    raise RunFailedError(f"{message}; try a lower training.learning_rate. The record is in {out / RECORD}")


def _validate(config: RunConfig, run: dict[str, Any], model: nn.Module, stage: Stage) -> dict[str, Any]:
    """Measures the model at the stage's length and draws the consequences; returns the metrics."""
    training = config.training
    data = split_batches(config, "validation", config.task_at(stage).seq_len)
    evaluation = evaluate(model, data, read_all=run["encoding"])
    metrics = evaluation.metrics()
    run["validation"] = metrics
    if run["encoding_attention_frac"] is None:
        run["encoding_attention_frac"] = metrics["attention_frac"]
    retrieval_acc = evaluation.scores.retrieval_acc()
    # A mixer that reads nothing even when everybody may has no encoding phase to wait for.
    if run["encoding"] and (retrieval_acc >= training.encoding_target or metrics["reads_frac"] == 0):
        run["encoding"], run["encoding_ended_step"] = False, run["step"]
        run["best"], run["evals_since_best"] = {}, 0
    last = run["stage"] == len(training.stages) - 1
    arrived = stage.until is not None and not run["encoding"] and retrieval_acc >= stage.until
    if not last and (arrived or run["stage_step"] >= stage.max_steps):
        run["stage"] += 1
        run["stage_step"] = 0
    elif last:
        _watch_for_the_end(config, run, metrics)
    return metrics


# How much better than the best so far counts as an improvement: absolute for accuracy, relative for the others.
_MARGINS = {"retrieval_acc": 0.001, "dynamics_mse": 0.01, "attention_frac": 0.02}


def _watch_for_the_end(config: RunConfig, run: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Begins the cool-down when no watched metric has improved for `patience_evals` validations."""
    best = run["best"]
    improved = False
    for name, margin in _MARGINS.items():
        value = metrics[name]
        if value is None:
            continue
        if name == "retrieval_acc":
            better = value > best.get(name, -math.inf) + margin
        else:
            better = value < best.get(name, math.inf) * (1 - margin)
        if better:
            best[name] = value
            improved = True
    run["evals_since_best"] = 0 if improved else run["evals_since_best"] + 1
    training = config.training
    # Nearer to the step limit than that, the rate is falling already, and it is the limit that ends the run.
    in_time = run["step"] + training.cooldown_steps <= training.max_steps
    if run["evals_since_best"] >= training.patience_evals and run["cooldown_from_step"] is None and in_time:
        run["cooldown_from_step"] = run["step"]


def _record(
    config: RunConfig,
    run: dict[str, Any],
    clock: _Clock,
    *,
    test: Evaluation | None = None,
    failure: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The run as one JSON document (see `records`)."""
    metrics = None if test is None else test.metrics()
    return {
        **run["header"],
        "experiment": config.experiment,
        "size": config.size,
        "mixer": config.mixer,
        "variant": config.variant,
        "seed": config.seed,
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "status": "failed" if failure else "finished",
        "failure": failure,
        "series": run["series"],
        "samples": [],
        "practice": None,
        "metrics": {"validation": run["validation"], "test": metrics},
        "oracle": {
            "attention_frac": config.task.expected_attention_frac if test is None else test.oracle_attention_frac,
            "dynamics_mse": config.task.dynamics_floor,
        },
        "consolidation_ratio": None
        if metrics is None or not run["encoding_attention_frac"]
        else consolidation_ratio(float(metrics["attention_frac"] or 0), run["encoding_attention_frac"]),
        "n_steps": run["step"],
        "encoding_ended_step": run["encoding_ended_step"],
        "cooldown_from_step": run["cooldown_from_step"],
        "n_train_tokens": run["n_tokens"],
        "train_reads_frac": run["n_reads"] / max(run["n_tokens"], 1),
        "n_parameters": None,
        "elapsed_s": clock.seconds(),
    }
