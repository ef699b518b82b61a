"""Language models from scratch, side by side: CRAM, a Llama of as many parameters, and a 1:7 hybrid with recurrence.

What it shows is the loss that each reaches on equal tokens, against the share of its tokens that attend. CRAM draws a
curve, a point for each price of a read; its own blocks that all read, or never, are the ends of that curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cramlab import records
from cramlab.config import (
    ConfigError,
    Count,
    CountOrZero,
    Layers,
    Positive,
    Seed,
    Share,
    Size,
    Weight,
    checked,
    differing,
    to_dict,
)
from cramlab.files import load_checkpoint, save_checkpoint, write_json
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.language_model.pretrain import PreparedText
from cramlab.mixer import MixerOutput
from cramlab.model import Block

ModelName = Literal["cram", "hybrid", "hybrid-first", "llama", "dense", "recurrent"]
Part = Literal["test", "validation"]


@checked("")
class TextRunConfig:
    """A model and its training, the same for all but for what is named here.

    The rate rises over `warmup_steps` and falls along a cosine to a tenth.

    Attributes:
        model: "cram"; "llama"; or CRAM blocks of which all read ("dense"), none ("recurrent"), or one in eight: the
            fifth, as in Jamba ("hybrid"), or the first ("hybrid-first").
        seed: of weights, batches and audits.
        vocab_size: of the tokenizer.
        context: tokens a sequence.
        n_layers: blocks.
        d_model: width.
        n_heads: attention heads.
        batch_size: sequences a step.
        n_steps: optimiser steps.
        learning_rate: of AdamW.
        warmup_steps: see above.
        encoding_frac: share of the steps in which CRAM reads everywhere; then its gates decide.
        read_price: nats that a read must save; what moves a CRAM model along its trade-off.
        eval_every_steps: steps between two looks at held-out text, and between two checkpoints.
        part: of the held-out text, that is looked at: "validation" for what is chosen by it, such as a learning rate.
        device: of torch.
    """

    model: ModelName = "cram"
    seed: Seed = 0
    vocab_size: Size = 2048
    context: Size = 256
    n_layers: Layers = 8
    d_model: Size = 128
    n_heads: Size = 4
    batch_size: Size = 16
    n_steps: Count = 1000
    learning_rate: Positive = 1e-3
    warmup_steps: CountOrZero = 100
    encoding_frac: Share = 0.3
    read_price: Weight = 0.01
    eval_every_steps: Count = 100
    part: Part = "test"
    device: Annotated[str, Field(pattern="^(cpu|cuda|mps|meta)(:[0-9]+)?$")] = "cpu"

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads = {self.n_heads} must divide d_model = {self.d_model}")

    @property
    def name(self) -> str:
        """Of the record."""
        price = f"-price{self.read_price:g}" if self.model == "cram" else ""
        rate = f"-rate{self.learning_rate:g}-{self.n_steps}-steps" if self.part == "validation" else ""
        return f"{self.model}{price}{rate}-seed{self.seed}{'-validation' if rate else ''}"

    def build(self) -> PreTrainedModel:
        """A fresh model; the MLPs of the others are as wide as gives them the parameters of the CRAM model."""
        make = {
            "cram": self._cram,
            "llama": self._llama,
            "hybrid": lambda width: self._cram(width, self._every_eighth(4)),
            "hybrid-first": lambda width: self._cram(width, self._every_eighth(0)),
            "dense": lambda width: self._cram(width, "always"),
            "recurrent": lambda width: self._cram(width, "never"),
        }[self.model]
        with torch.device("meta"):
            wanted = self._cram(4 * self.d_model).num_parameters()
            narrow, wide = (make(width).num_parameters() for width in (64, 128))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return make(64 + round((wanted - narrow) / (wide - narrow) * 64))

    def _every_eighth(self, first: int) -> list[str]:
        """Routers of a model in which every eighth layer reads, always."""
        return ["always" if i % 8 == first else "never" for i in range(self.n_layers)]

    def _cram(self, width: int, router: str | list[str] = "benefit") -> PreTrainedModel:
        config = CRAMForCausalLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=width,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            memory_capacity=None,
            router=router,
            read_price=self.read_price,
        )
        return CRAMForCausalLM(config)

    def _llama(self, width: int) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=width,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config)


def run_text(
    config: TextRunConfig,
    text: PreparedText,
    out: Path,
    log: Callable[[str], None] | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Trains one model and writes `out/NAME.json`; goes on from `out/NAME.pt` if it is there.

    Args:
        config: the run.
        text: from `language_model.pretrain.prepare`, with the same `vocab_size`.
        out: folder of the runs.
        log: called with a line at each look at held-out text.
        deadline: by `time.time()`; none after it, the run stops at its next checkpoint.

    Raises:
        ValueError: when the folder holds a run of this name and another config, or there is too little held-out text.
        FloatingPointError: when the loss is not finite.
        TimeoutError: when the deadline has passed; called again, the run goes on.
    """
    record_path, checkpoint = out / f"{config.name}.json", out / f"{config.name}.pt"
    looked_at(text, config)
    if record_path.exists():
        record = records.read_json(record_path)
        _check_same(config, text, record, record_path)
        return record
    device = torch.device(config.device)
    model = config.build()
    nn.Module.to(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    run: dict[str, Any] = {"step": 0, "series": [], "elapsed_s": 0.0}
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint)
        _check_same(config, text, saved, checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run = saved["run"]
    start = time.perf_counter() - run["elapsed_s"]
    while run["step"] < config.n_steps:
        step = run["step"]
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(config, step)
        tokens = _windows(text.train, config, step).to(device)
        encoding = {"read_all": step < config.encoding_frac * config.n_steps} if config.model == "cram" else {}
        model.train()
        torch.manual_seed(config.seed * 1_000_003 + step)  # of audits
        loss = model(input_ids=tokens, labels=tokens, **encoding).loss
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"{config.name}: the loss is not finite at step {step}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run["step"] += 1
        if run["step"] % config.eval_every_steps == 0 or run["step"] == config.n_steps:
            row = {"step": run["step"], "n_tokens": run["step"] * tokens.numel()} | held_out(model, text, config)
            run["series"].append(row)
            run["elapsed_s"] = time.perf_counter() - start
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, weights | {"run": run, "config": to_dict(config), "text_sha256": text.digest})
            if log is not None:
                log(f"{config.name} {row} {run['elapsed_s']:.0f} s")
            if deadline is not None and time.time() > deadline and run["step"] < config.n_steps:
                raise TimeoutError(f"{config.name}: out of time at step {run['step']}; call again to go on")
    record = records.header(device) | {
        "name": config.name,
        "config": to_dict(config),
        "text_sha256": text.digest,
        "n_parameters": model.num_parameters(),
        "series": run["series"],
        "elapsed_s": run["elapsed_s"],
    }
    write_json(record_path, record)
    checkpoint.unlink(missing_ok=True)
    return record


def _check_same(config: TextRunConfig, text: PreparedText, other: dict[str, Any], path: Path) -> None:
    """A run may go on elsewhere, and only as what it was."""
    changed = differing(other.get("config"), to_dict(config))
    changed.pop("device", None)
    if changed:
        raise ValueError(f"{path} is of a run with other settings ({changed}); give another folder, or delete it")
    if other.get("text_sha256") != text.digest:
        raise ValueError(
            f"{path} is of a run on another text, or of an earlier version of cramlab, which did not note it; give "
            "another folder, or delete it"
        )


def _rate(config: TextRunConfig, step: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.n_steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _windows(stream: Tensor, config: TextRunConfig, step: int) -> Tensor:
    """Random windows of the stream, the same for every model at a step, (B, T)."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - config.context, (config.batch_size,), generator=generator)
    return torch.stack([stream[s : s + config.context] for s in starts.tolist()]).long()


def looked_at(text: PreparedText, config: TextRunConfig, n_batches: int = 16) -> Tensor:
    """The windows of the held-out text's part, (N, T): for the test the first so many batches, for validation the next.

    Raises:
        ValueError: when there is too little text for any.
    """
    windows = text.held_out[: len(text.held_out) // config.context * config.context].view(-1, config.context).long()
    n_windows = n_batches * config.batch_size
    part = windows[:n_windows] if config.part == "test" else windows[n_windows : 2 * n_windows]
    if not len(part):
        n_wanted = 1 + (0 if config.part == "test" else n_windows)
        raise ValueError(
            f'{len(text.held_out)} tokens of held-out text are too few for part = "{config.part}": '
            f"{n_wanted} windows of context = {config.context} are needed; give more text, or a lower batch_size"
        )
    return part


@torch.no_grad()
def held_out(model: PreTrainedModel, text: PreparedText, config: TextRunConfig, n_batches: int = 16) -> dict[str, Any]:
    """Nats a token on held-out text by the gates' own rule, and the share of tokens that attend, by layer."""
    model.eval()
    windows = looked_at(text, config, n_batches)
    shares = torch.zeros(config.n_layers, dtype=torch.float64)
    seen: list[float] = []

    def count(_module: nn.Module, _args: Any, output: MixerOutput) -> None:
        seen.append(float(output.trace.scored.double().mean()))

    hooks = []
    if isinstance(model, CRAMForCausalLM):
        hooks = [block.mixer.register_forward_hook(count) for block in cast("list[Block]", list(model.layers))]
    total = 0.0
    try:
        for tokens in windows.split(config.batch_size):
            logits = model(input_ids=tokens.to(config.device), use_cache=False).logits[:, :-1]
            nats = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:].to(config.device))
            total += float(nats) * len(tokens) / len(windows)
            shares += torch.tensor(seen or [1.0] * config.n_layers, dtype=torch.float64) * len(tokens) / len(windows)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {"nats_per_token": total, "attention_frac": float(shares.mean()), "attention_frac_by_layer": shares.tolist()}
