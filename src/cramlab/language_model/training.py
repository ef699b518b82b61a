"""The training loop of language models, with attention or with CRAM layers, on equal tokens and equal sizes.

It measures the loss that each model reaches against the share of its tokens that attend. CRAM draws a curve, one point
for each price of a read; CRAM blocks that all read or never read are the ends of that curve.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cramlab import records
from cramlab.config import ConfigError, differing, to_dict
from cramlab.files import load_checkpoint, save_checkpoint, write_json
from cramlab.language_model.compilation import compile_for_training
from cramlab.language_model.inputs import known_windows
from cramlab.language_model.modeling import CRAMForCausalLM
from cramlab.language_model.reading_schedule import ReadingSchedule, quantile_threshold
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.saved_models import STEP_FILE, save_model, step_folder
from cramlab.language_model.scoring import reads_of
from cramlab.language_model.text import Part, PreparedText, held_out_windows, open_corpus, random_windows
from cramlab.launch import launch
from cramlab.ranks import ALONE, Ranks, part_of_batch

N_EVAL_BATCHES = 16
CHECKPOINT_EVERY_S = 60.0
_FINITE_EVERY_STEPS = 20
_SETTLING_BATCHES = 8


@dataclass
class TextProgress:
    """How far a run has come; checkpoints hold it as a dict.

    Attributes:
        step: optimiser steps made.
        series: evaluations so far.
        elapsed_s: seconds of work up to the newest checkpoint.
        step_ms: milliseconds of a step, mean from one evaluation to the next, without the evaluations.
        reading: state of a CRAM model's reading.
    """

    step: int = 0
    series: list[dict[str, Any]] = field(default_factory=list)
    elapsed_s: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    reading: dict[str, Any] = field(default_factory=dict)


def run_text(
    config: TextRunConfig,
    text: PreparedText,
    out: Path,
    log: Callable[[str], None] | None = None,
    deadline: float | None = None,
    assess: Callable[[PreTrainedModel], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Trains one model and writes `out/NAME.json`; resumes from `out/NAME.pt` if it exists.

    Models for the audit over training are saved in `out/NAME/step-N`; see `TextRunConfig.n_checkpoints`.

    Args:
        config: the run.
        text: from `prepare`, with the same `vocab_size`.
        out: folder of the runs.
        log: called with a line at each evaluation.
        deadline: value of `time.time()` after which the run stops at its next checkpoint; None: no deadline.
        assess: called with the trained model; what it returns becomes entries of the record.

    Returns:
        The record.

    Raises:
        ConfigError: when the machine has fewer devices than the run.
        ValueError: when the folder holds a run of this name with another config or text, there is too little held-out
            text, or models are to be saved and the text has no tokenizer.
        FloatingPointError: when the loss is not finite.
        TimeoutError: when the deadline has passed; the same call continues the run.
        LostRankError: when a process of a run on several devices is killed; the same call continues the run.
    """
    path, checkpoint = out / f"{config.name}.json", out / f"{config.name}.pt"
    _check_text(config, text)
    if path.exists():
        record = records.read_json(path)
        _check_same(config, text, record, path)
        if all((step_folder(config, out, step) / STEP_FILE).exists() for step in config.checkpoint_steps):
            checkpoint.unlink(missing_ok=True)  # there if the run was killed right after its record was written
            return record
    if config.devices > 1:
        source = text if text.files is None else text.files.folder  # mapped into memory anew, not copied
        given = {"config": config, "source": source, "out": out.absolute(), "deadline": deadline}
        launch(_fit_rank, given, n_ranks=config.devices, name=config.name, on_message=log)
    model, progress = _fit(config, text, out, log, deadline, ALONE)  # of several ranks, from their last checkpoint
    record = records.header(torch.device(config.device)) | {
        "kind": "text",
        "name": config.name,
        "config": to_dict(config),
        "text_sha256": text.digest,
        "n_parameters": model.num_parameters(),
        "series": progress.series,
        "elapsed_s": progress.elapsed_s,
        "ms_per_step": statistics.median(progress.step_ms),
    }
    if assess is not None:
        with torch.compiler.set_stance("force_eager"):  # it calls the model with many shapes
            record |= assess(model)
    write_json(path, record)
    checkpoint.unlink(missing_ok=True)
    return record


def _fit_rank(
    ranks: Ranks, log: Callable[[str], None], config: TextRunConfig, source: PreparedText | Path, out: Path,
    deadline: float | None,
) -> None:  # fmt: skip
    """The body of a rank's process. On a CPU the ranks share its threads."""
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks.n))
    text = open_corpus(source) if isinstance(source, Path) else source
    _fit(config, text, out, log if ranks.first else None, deadline, ranks)


def _fit(
    config: TextRunConfig, text: PreparedText, out: Path, log: Callable[[str], None] | None, deadline: float | None,
    ranks: Ranks,
) -> tuple[PreTrainedModel, TextProgress]:  # fmt: skip
    """The loop. Of several ranks, the first evaluates, decides and writes."""
    device, checkpoint = torch.device(config.device), out / f"{config.name}.pt"
    model, optimizer, progress = _prepare(config, text, checkpoint, device)
    reading = ReadingSchedule(**progress.reading)
    start_s, saved_s = time.perf_counter() - progress.elapsed_s, time.perf_counter()
    if progress.step == 0 and config.checkpoint_steps and ranks.first:
        save_model(model, text, config, out, 0, _figures(model, text, config, 0))
    from_step, from_s = progress.step, time.perf_counter()
    while progress.step < config.n_steps:
        train_step(model, optimizer, text, config, progress.step, reading, ranks)
        progress.step += 1
        last = progress.step == config.n_steps
        if last and config.reads_frac is not None:
            _settle(cast("CRAMForCausalLM", model), text, config, reading)
        if progress.step in config.checkpoint_steps and ranks.first:
            save_model(model, text, config, out, progress.step, _figures(model, text, config, progress.step))
        if progress.step % config.eval_every_steps and not last:
            continue
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        progress.step_ms.append(1000 * (time.perf_counter() - from_s) / (progress.step - from_step))
        row, gain = ranks.from_first(lambda: _evaluated(model, text, config, progress.step, reading))
        if gain is not None:
            reading.saw_gain(config, progress.step, gain)
        progress.series.append(row | ({"encoding_ended_at": reading.ended_at} if config.routes else {}))
        progress.elapsed_s, progress.reading = time.perf_counter() - start_s, dict(vars(reading))
        out_of_time = ranks.from_first(lambda: deadline is not None and time.time() > deadline)
        if ranks.first and (last or out_of_time or time.perf_counter() - saved_s >= CHECKPOINT_EVERY_S):
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            whose = {"run": vars(progress), "config": to_dict(config), "text_sha256": text.digest}
            save_checkpoint(checkpoint, weights | whose)
            saved_s = time.perf_counter()
        if log is not None:
            log(f"{config.name} {progress.series[-1]} {progress.elapsed_s:.0f} s")
        if out_of_time and not last:
            raise TimeoutError(f"{config.name}: out of time at step {progress.step}; call again to go on")
        from_step, from_s = progress.step, time.perf_counter()
    return model, progress


def _check_text(config: TextRunConfig, text: PreparedText) -> None:
    """Refuses text and devices that cannot serve the run, before any work is done."""
    if config.device == "cuda" and config.devices > (n_cuda := torch.cuda.device_count()):
        raise ConfigError(f"devices = {config.devices} exceeds the {n_cuda} of this machine; give {max(1, n_cuda)}")
    held_out_windows(text, config.part, config.context, N_EVAL_BATCHES * config.batch_size)
    if config.checkpoint_steps and text.tokenizer is None:
        raise ValueError(f"n_checkpoints = {config.n_checkpoints} saves models with a tokenizer; the text has none")


def _check_same(config: TextRunConfig, text: PreparedText, other: dict[str, Any], path: Path) -> None:
    """Refuses a record or checkpoint of another run. Devices may change; fields of later versions have defaults."""
    held = other.get("config")
    changed = differing(to_dict(TextRunConfig()) | held if isinstance(held, dict) else held, to_dict(config))
    for name in ("device", "devices", "accumulate"):
        changed.pop(name, None)
    if changed:
        raise ValueError(f"{path} is of a run with other settings ({changed}); give another folder, or delete it")
    if other.get("text_sha256") != text.digest:
        raise ValueError(
            f"{path} is of a run on another text, or of an earlier version of cramlab, which did not note it; give "
            "another folder, or delete it"
        )


def _prepare(
    config: TextRunConfig, text: PreparedText, checkpoint: Path, device: torch.device
) -> tuple[PreTrainedModel, torch.optim.AdamW, TextProgress]:
    """Model, optimiser and progress, fresh or from the checkpoint."""
    model, optimizer = start(config)
    if not checkpoint.exists():
        return model, optimizer, TextProgress()
    saved = load_checkpoint(checkpoint)
    _check_same(config, text, saved, checkpoint)
    model.load_state_dict(saved["model"])
    if isinstance(threshold := saved["run"].get("reading", {}).get("threshold"), Tensor):
        saved["run"]["reading"]["threshold"] = threshold.to(device)
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer, TextProgress(**saved["run"])


def start(config: TextRunConfig) -> tuple[PreTrainedModel, torch.optim.AdamW]:
    """A fresh model on its device, compiled if the run asks for it, and its optimiser."""
    model = config.build()
    nn.Module.to(model, torch.device(config.device))
    if config.compile:
        compile_for_training(model)
    rate, decay, fused = config.learning_rate, config.weight_decay, config.device.startswith("cuda")
    return model, torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=fused)


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    text: PreparedText,
    config: TextRunConfig,
    step: int,
    reading: ReadingSchedule,
    ranks: Ranks = ALONE,
) -> None:
    """One optimiser step. Every model sees the same windows at a step; each rank draws its own, in one part or several.

    The host waits for the device at one step of 20 only, to refuse a loss that is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * rate_factor(config, step)
    seed = config.seed * 1_000_003 + step
    asked: dict[str, Any] = {"read_all": reading.reads_all(config, step)} if config.routes else {}
    if config.reads_frac is not None:
        asked["output_gates"] = True
    if config.loss_over == "targets":
        asked["num_items_in_batch"] = config.batch_size * (config.context - 1) // ranks.n
    if not model.training:
        model.train()
    optimizer.zero_grad()
    losses, margins = [], []
    for rows in _parts(ranks.rows(config.batch_size), config.accumulate):
        windows = random_windows(text.train, config.context, config.batch_size, seed, rows)
        tokens = _on_device(windows, config)
        torch.manual_seed(seed)  # audits, which every part draws for the whole batch
        with known_windows(windows, config.vocab_size), _autocast(config), part_of_batch(rows.start, config.batch_size):
            output = model(input_ids=tokens, labels=tokens, **asked)
        output.loss.backward()
        losses.append(output.loss.detach())
        margins.append(output.gate_margins if config.reads_frac is not None else ())
    if step % _FINITE_EVERY_STEPS == 0 and not bool(torch.isfinite(ranks.sum(torch.stack(losses).sum()))):
        raise FloatingPointError(f"{config.name}: the loss is not finite at step {step}; lower learning_rate")
    ranks.average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if config.reads_frac is not None:
        share = reading.share(config, step + 1)
        joined = [ranks.gathered(torch.cat(layer)) for layer in zip(*margins, strict=True)]
        threshold = reading.follow(joined, config.n_layers, share)
        cast("CRAMForCausalLM", model).set_threshold(threshold)


def _parts(rows: range, n: int) -> list[range]:
    """Equal parts of a rank's rows."""
    each = len(rows) // n
    return [rows[i * each : (i + 1) * each] for i in range(n)]


def _on_device(tokens: Tensor, config: TextRunConfig) -> Tensor:
    """Tokens on the device of a run, copied without waiting for the steps that are queued there."""
    pinned = tokens.pin_memory() if config.device.startswith("cuda") else tokens
    return pinned.to(config.device, non_blocking=True)


def _autocast(config: TextRunConfig) -> torch.autocast:
    """The context in which a model of the run is called."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")


@contextlib.contextmanager
def _uncompiled(config: TextRunConfig) -> Iterator[None]:
    """The context in which a model is evaluated: a few calls do not repay graphs of their own."""
    stance = torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()
    with stance, _autocast(config):
        yield


@torch.no_grad()
def _settle(model: CRAMForCausalLM, text: PreparedText, config: TextRunConfig, reading: ReadingSchedule) -> None:
    """Sets the final threshold, by the share of reads on training windows that the run did not draw.

    What one layer reads changes what the gates above see, so the quantile is taken several times.
    """
    assert reading.threshold is not None
    assert config.reads_frac is not None
    model.eval()
    windows = random_windows(text.train, config.context, _SETTLING_BATCHES * config.batch_size, seed=config.n_steps)
    for _ in range(3):
        margins: list[tuple[Tensor, ...]] = []
        for tokens in windows.split(config.batch_size):
            with _uncompiled(config):
                output = model(input_ids=tokens.to(config.device), use_cache=False, output_gates=True)
            margins.append(cast("Any", output).gate_margins)
        joined = [torch.cat(layer) for layer in zip(*margins, strict=True)]
        reading.threshold = reading.threshold + quantile_threshold(joined, config.n_layers, config.reads_frac)
        model.set_threshold(reading.threshold)


def _figures(model: PreTrainedModel, text: PreparedText, config: TextRunConfig, step: int) -> dict[str, Any]:
    """Figures of a model that is saved."""
    return held_out(model, text, config) | {"tokens": _n_tokens(config, step)}


def _evaluated(
    model: PreTrainedModel, text: PreparedText, config: TextRunConfig, step: int, reading: ReadingSchedule
) -> tuple[dict[str, Any], float | None]:
    """A row of the series, and what reading gains; None: nobody asks."""
    row, gain = {"step": step, "n_tokens": _n_tokens(config, step)} | held_out(model, text, config), None
    if not config.routes:
        return row, gain
    row["threshold"] = None if reading.threshold is None else float(reading.threshold)
    if config.least_gain is not None and reading.ended_at is None:
        with_reads, without = (
            held_out(model, text, config, _SETTLING_BATCHES, part="validation", **{name: True})["nats_per_token"]
            for name in ("read_all", "read_none")
        )
        row["gain"] = gain = without - with_reads
    return row, gain


def rate_factor(config: TextRunConfig, step: int) -> float:
    """Factor on the learning rate: a linear warm-up to 1, then a cosine down to 0.1."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.n_steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def held_out(
    model: PreTrainedModel,
    text: PreparedText,
    config: TextRunConfig,
    n_batches: int = N_EVAL_BATCHES,
    *,
    part: Part | None = None,
    **asked: bool,
) -> dict[str, Any]:
    """Evaluates a model on held-out text, by the gates' own decisions.

    Args:
        model: the model.
        text: its text.
        config: its run.
        n_batches: batches to evaluate on.
        part: part of the held-out text; None: that of the run.
        asked: `read_all` or `read_none` of a CRAM model.

    Returns:
        `nats_per_token`; `attention_frac`, share of the tokens that attend; `attention_frac_by_layer`, a list.
    """
    model.eval()
    windows = held_out_windows(text, part or config.part, config.context, n_batches * config.batch_size)
    shares, total = torch.zeros(config.n_layers, dtype=torch.float64), 0.0
    with reads_of(model) as reads:
        for tokens in windows.split(config.batch_size):
            weight = len(tokens) / len(windows)
            total += _nats(model, tokens.to(config.device), config, asked) * weight
            found = torch.stack([read.double().mean() for read in reads]).cpu() if reads else torch.ones_like(shares)
            shares += weight * found
            reads.clear()
    return {"nats_per_token": total, "attention_frac": float(shares.mean()), "attention_frac_by_layer": shares.tolist()}


def _nats(model: PreTrainedModel, tokens: Tensor, config: TextRunConfig, asked: dict[str, bool]) -> float:
    """Mean cross-entropy of the next token, in nats."""
    with _uncompiled(config):
        logits = model(input_ids=tokens, use_cache=False, **asked).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()))


def _n_tokens(config: TextRunConfig, step: int) -> int:
    return step * config.batch_size * config.context
