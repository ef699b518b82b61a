"""A small GPT-2, with attention or with CRAM layers, trained from scratch and saved along the way for the audit."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from cramlab.batch import Batch
from cramlab.config import (
    ConfigError,
    Count,
    CountOrZero,
    Layers,
    Positive,
    Seed,
    Size,
    Weight,
    checked,
    differing,
    to_dict,
)
from cramlab.files import refuse_full_disk, write_json, write_text
from cramlab.language_model.configuration_gpt2 import CramGPT2Config
from cramlab.language_model.cram_gpt2 import CramGPT2LMHeadModel, Outputs, reads_frac, routed
from cramlab.mixer import Routing
from cramlab.objective import LossConfig, TokenLosses, gate_loss, masked_mean
from cramlab.records import read_json

HELD_OUT = "held-out.jsonl"
STEP_FILE = "step.json"


@checked("pretrain")
class PretrainConfig:
    """A model and its training.

    The rate rises over `warmup_steps` and falls along a cosine to a tenth. CRAM layers read everywhere for the first
    `encoding_frac` of the steps; then their gates decide, and `audit_frac` of the tokens reads anyway.

    Attributes:
        mixer: "attention", or "cram" for CRAM layers in its place.
        seed: of weights, batches and audits.
        vocab_size: of the tokenizer.
        context: tokens a sequence.
        n_layers: blocks.
        d_model: width.
        n_heads: attention heads.
        batch_size: sequences a step.
        n_steps: optimiser steps.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: see above.
        n_checkpoints: saved models after the untrained one, at steps that grow by a constant factor.
        first_checkpoint: step of the first of them.
        encoding_frac: see above.
        audit_frac: see above.
        loss: prices and weights of the CRAM terms.
    """

    mixer: Literal["attention", "cram"] = "attention"
    seed: Seed = 0
    vocab_size: Size = 1024
    context: Size = 128
    n_layers: Layers = 3
    d_model: Size = 64
    n_heads: Size = 4
    batch_size: Size = 16
    n_steps: Count = 1000
    learning_rate: Positive = 2e-3
    weight_decay: Weight = 0.01
    warmup_steps: CountOrZero = 50
    n_checkpoints: Size = 7
    first_checkpoint: Count = 30
    encoding_frac: Annotated[float, Field(gt=0, lt=1)] = 0.25
    audit_frac: Annotated[float, Field(gt=0, lt=1)] = 0.1
    loss: LossConfig = field(default_factory=lambda: LossConfig(read_price=0.02, retrieval_emphasis=1.0))

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.first_checkpoint > self.n_steps:
            raise ConfigError(f"pretrain.first_checkpoint = {self.first_checkpoint} must lie between 1 and n_steps")
        if self.d_model % self.n_heads:
            raise ConfigError(f"pretrain.n_heads = {self.n_heads} must divide d_model = {self.d_model}")

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.mixer}-seed{self.seed}"

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps after which the model is saved; 0 is the untrained one."""
        if self.n_checkpoints == 1:
            return [0, self.n_steps]
        factor = (self.n_steps / self.first_checkpoint) ** (1 / (self.n_checkpoints - 1))
        return [0, *sorted({round(self.first_checkpoint * factor**i) for i in range(self.n_checkpoints)})]

    def build(self) -> GPT2LMHeadModel:
        """A fresh model."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocab_size, "n_positions": self.context, "n_embd": self.d_model,
            "n_layer": self.n_layers, "n_head": self.n_heads, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if self.mixer == "attention":
                return GPT2LMHeadModel(GPT2Config(**sizes))
            return CramGPT2LMHeadModel(CramGPT2Config(**sizes))


Log = Callable[[str], None]


@dataclass(frozen=True)
class PreparedText:
    """Documents as tokens, for any number of runs.

    Attributes:
        tokenizer: byte-level BPE, trained on the training documents.
        train: their tokens, one document after the other.
        held_out: tokens of the documents that are never trained on.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    held_out: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens, and so of the text and what the tokenizer made of it."""
        sha = hashlib.sha256(f"{len(self.train)} {len(self.held_out)} ".encode())
        for tokens in (self.train, self.held_out):
            sha.update(tokens.long().numpy().data)
        return sha.hexdigest()


def prepare(
    documents: Sequence[tuple[str, str]], out: Path, vocab_size: int, held_out_frac: float = 0.1
) -> PreparedText:
    """Splits documents (names, texts) at random, trains the tokenizer, writes the rest to `out/held-out.jsonl`.

    Raises:
        FileExistsError: when other documents were held out there.
    """
    train, held_out = _split(documents, held_out_frac)
    lines, path = "".join(json.dumps({"name": n, "text": t}) + "\n" for n, t in held_out), out / HELD_OUT
    if path.exists() and path.read_bytes() != lines.encode():
        raise FileExistsError(f"{path} holds the held-out text of other runs; give another folder, or remove them")
    write_text(path, lines)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text for _, text in train], vocab_size=vocab_size, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, clean_up_tokenization_spaces=False)
    return PreparedText(tokenizer, _stream(tokenizer, train), _stream(tokenizer, held_out))


def pretrain(
    config: PretrainConfig,
    text: PreparedText,
    out: Path,
    log: Log | None = None,
    device: str = "cpu",
) -> None:
    """Trains one model; writes `out/NAME/step-N` folders that `load` can read. A run that is `finished` is left alone.

    Args:
        config: the run.
        text: from `prepare`, with the same `vocab_size`.
        out: folder of the runs.
        log: called with a line at each checkpoint.
        device: where to train.

    Raises:
        FileExistsError: when checkpoints of other settings, or of another text, are there.
        FloatingPointError: when the loss is not finite.
    """
    if finished(config, text, out):
        return
    logging.disable_progress_bar()
    validation = text.held_out[: 16 * config.batch_size * config.context].to(device)
    model = config.build()
    nn.Module.to(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    batches = _batches(text.train, config)
    start, n_reads = time.perf_counter(), 0.0
    for step in range(config.n_steps + 1):
        if step in config.checkpoint_steps:
            row = _validate(model, validation, config)
            row |= {"step": step, "tokens": step * config.batch_size * config.context, "mixer": config.mixer,
                    "seed": config.seed, "training_reads_frac": n_reads / max(step, 1) if step else None,
                    "elapsed_s": round(time.perf_counter() - start, 1), "config": to_dict(config),
                    "text_sha256": text.digest}  # fmt: skip
            _save(model, text.tokenizer, row, out / config.name / f"step-{step:06d}")
            if log is not None:
                log(f"{config.name} step {step}: {row['nats_per_token']:.3f} nats, reads {row['reads_frac']}")
        if step == config.n_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(config, step)
        terms, reads = _terms(model, next(batches).to(device), config, step)
        n_reads += reads
        loss = torch.stack(list(terms.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"{config.name}: the loss is not finite at step {step}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def finished(config: PretrainConfig, text: PreparedText, out: Path) -> bool:
    """Whether the last checkpoint of this very run is there, whole.

    Raises:
        FileExistsError: when checkpoints of other settings, or of another text, are there; or such as say nothing of
            their text, since an earlier version wrote them.
    """
    for path in sorted((out / config.name).glob(f"step-*/{STEP_FILE}")):
        row = read_json(path)
        changed = [] if not isinstance(row, dict) else list(differing(to_dict(config), row.get("config")))
        if not isinstance(row, dict) or row.get("text_sha256") != text.digest:
            changed.append("text")
        if changed:
            raise FileExistsError(
                f"{path.parent} is of a run of other settings or text ({', '.join(changed)}); give another folder, or "
                "remove it"
            )
    last = out / config.name / f"step-{config.n_steps:06d}"
    return (last / STEP_FILE).exists() and read_json(last / STEP_FILE).get("weights_sha256") == _digest_of(last)


def _digest_of(folder: Path) -> str | None:
    """SHA-256 of the weights of a checkpoint; None where there are none."""
    path = folder / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _split(documents: Sequence[tuple[str, str]], frac: float) -> tuple[list, list]:
    """Documents in a fixed random order, the last of them held out."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    n_train = round((1 - frac) * len(documents))
    return [documents[i] for i in order[:n_train]], [documents[i] for i in order[n_train:]]


def _stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[tuple[str, str]]) -> Tensor:
    """All documents one after the other."""
    encoded = tokenizer([text for _, text in documents], verbose=False)["input_ids"]
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in encoded])


def _batches(stream: Tensor, config: PretrainConfig) -> Iterator[Tensor]:
    """Random windows of the stream, (B, T)."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        starts = torch.randint(len(stream) - config.context, (config.batch_size,), generator=generator)
        yield torch.stack([stream[s : s + config.context] for s in starts.tolist()]).long()


def _rate(config: PretrainConfig, step: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.n_steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _nats(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats of the token after each, (B, T); zero at the last."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.pad(F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none"), (0, 1))


def _terms(
    model: GPT2LMHeadModel, tokens: Tensor, config: PretrainConfig, step: int
) -> tuple[dict[str, Tensor], float]:
    """The weighted terms of the objective, and the share of tokens that read for it, second pass included."""
    if not isinstance(model, CramGPT2LMHeadModel):
        return {"task": _nats(model, tokens)[:, :-1].mean()}, 1.0
    layer = step % config.n_layers  # layers take turns at going without their reads
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    audits = (torch.rand(tokens.shape, generator=generator) < config.audit_frac).to(tokens.device)
    encoding = step < config.encoding_frac * config.n_steps
    routing = Routing(read_all=True) if encoding else Routing(audits=audits)
    model.train()
    with routed(model, routing) as outputs:
        nats = _nats(model, tokens)
    with routed(model, routing, without_reads_in=layer) as others:
        without = _nats(model, tokens)
    reads = _share(outputs) + _share(others)
    trace = outputs[layer].trace
    terms = {
        "task": nats[:, :-1].mean(),
        "no_read": config.loss.no_read_weight * masked_mean(without, trace.attended & _has_target(tokens)),
        "consolidation": config.loss.consolidation_weight
        * torch.stack([outputs[i].aux["consolidation"] for i in range(config.n_layers)]).mean(),
    }
    if trace.gate_logit is not None:
        terms["gate"] = config.loss.gate_weight * gate_loss(
            trace.gate_logit, _losses(nats), _losses(without), trace.attended, _batch(tokens), config.loss
        )
    return terms, reads


def _share(outputs: Outputs) -> float:
    shares = reads_frac(outputs)
    assert shares is not None
    return float(shares.mean())


def _has_target(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, -1] = False
    return mask


def _losses(nats: Tensor) -> TokenLosses:
    return TokenLosses(retrieval=nats.detach(), dynamics=torch.zeros_like(nats))


def _batch(tokens: Tensor) -> Batch:
    """Text as the library's batch: the next token is what is to be retrieved."""
    nothing, has_target = torch.zeros_like(tokens, dtype=torch.float32), _has_target(tokens)
    return Batch(
        discrete=tokens[..., None], continuous=nothing[..., None], gaps=nothing + 1, horizons=nothing + 1,
        valid=torch.ones_like(has_target), dynamics_target=nothing, dynamics_mask=torch.zeros_like(has_target),
        retrieval_target=tokens.roll(-1, dims=1), retrieval_mask=has_target, slices={}, oracle_reads=has_target,
        pattern=torch.full_like(tokens, -1),
    )  # fmt: skip


@torch.no_grad()
def _validate(model: nn.Module, stream: Tensor, config: PretrainConfig) -> dict[str, Any]:
    """Nats per token of held-out text under the router's own rule and when all tokens read; reads, by layer."""
    model.eval()
    windows = stream[: len(stream) // config.context * config.context].view(-1, config.context).long()
    total, total_read_all, shares = 0.0, 0.0, torch.zeros(config.n_layers, dtype=torch.float64)
    for tokens in windows.split(config.batch_size):
        weight = len(tokens) / len(windows)
        with routed(model, Routing()) as outputs:
            total += weight * float(_nats(model, tokens)[:, :-1].mean())
        found = reads_frac(outputs)
        shares += weight * (torch.ones(config.n_layers, dtype=torch.float64) if found is None else found.cpu())
        with routed(model, Routing(read_all=True)):
            total_read_all += weight * float(_nats(model, tokens)[:, :-1].mean())
    model.train()
    return {
        "nats_per_token": total,
        "nats_per_token_reading_all": total_read_all,
        "reads_frac": float(shares.mean()),
        "reads_frac_by_layer": shares.tolist(),
    }


def _save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], folder: Path) -> None:
    """A checkpoint, which is put in its place when it is whole; one of the same weights is kept."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        weights = _digest_of(partial)
        write_json(partial / STEP_FILE, row | {"weights_sha256": weights})
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        refuse_full_disk(error, folder)
        raise
    if folder.exists():  # from the same run, cut off later on
        step = folder / STEP_FILE
        kept = step.exists() and read_json(step).get("weights_sha256") == weights == _digest_of(folder)
        shutil.rmtree(partial if kept else folder)
    if partial.exists():
        partial.replace(folder)
