"""Scores the next-token predictions of a causal language model, with the reads behind each, in any slice of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cramlab.language_model.block import CRAMBlock, Passed
from cramlab.mixer import Mixer, MixerOutput


class Scored(NamedTuple):
    """Predictions of the tokens of windows (N, T), on the CPU. Entry t is about token t + 1, predicted at token t.

    Attributes:
        nats: cross-entropy of the token, float32 (N, T - 1).
        right: the token has the largest logit, bool (N, T - 1).
        reads: the layer reads at token t, bool (N, T - 1, L); None: the model has no mixers that say.
    """

    nats: Tensor
    right: Tensor
    reads: Tensor | None

    def summary(self, chosen: Tensor) -> dict[str, Any]:
        """Means over the chosen entries, bool (N, T - 1): `n`, `nats`, `reads_frac`, `reads_frac_by_layer`.

        A mean of nothing is None, and so are reads that the model does not report.
        """
        n = int(chosen.sum())
        by_layer = self.reads[chosen].double().mean(0).tolist() if n and self.reads is not None else None
        return {
            "n": n,
            "nats": float(self.nats[chosen].double().mean()) if n else None,
            "reads_frac": sum(by_layer) / len(by_layer) if by_layer else None,
            "reads_frac_by_layer": by_layer,
        }


@torch.no_grad()
def score(
    model: nn.Module, windows: Tensor, *, batch_size: int, autocast: bool = False, read_none: bool = False
) -> Scored:
    """Scores every token of windows but the first, by the gates' own decisions.

    Args:
        model: a causal language model; `model(input_ids).logits` are (B, T, V).
        windows: token ids, int64 (N, T), of at least two tokens.
        batch_size: windows in a call.
        autocast: calls the model in bfloat16 where PyTorch's autocast does; losses are float32 in any case.
        read_none: no token of a `CRAMForCausalLM` reads.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    options: dict[str, Any] = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}
    if read_none:
        options["read_none"] = True
    parts: list[Scored] = []
    with _evaluating(model), reads_of(model) as reads:
        for batch in windows.split(batch_size):
            tokens = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = model(input_ids=tokens, **options).logits[:, :-1]
            targets = tokens[:, 1:]
            nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            right = logits.argmax(-1) == targets
            read = torch.stack(reads, -1)[:, :-1].cpu() if reads else None
            reads.clear()
            parts.append(Scored(nats.view(targets.shape).cpu(), right.cpu(), read))
    found = [part.reads for part in parts if part.reads is not None]
    nats, right = (torch.cat([getattr(part, name) for part in parts]) for name in ("nats", "right"))
    return Scored(nats, right, torch.cat(found) if found else None)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def reads_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each mixer of the model appends the tokens that it reads at, bool (B, T), in a call.

    The blocks of a CRAM language model say it themselves, since a compiled block does not call its mixer's hooks.
    """
    reads: list[Tensor] = []

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        found = Passed(*output) if isinstance(module, CRAMBlock) else cast("MixerOutput", output).trace
        reads.append(found.scored)

    hooks = [module.register_forward_hook(note) for module in _layers(model)]
    try:
        yield reads
    finally:
        for hook in hooks:
            hook.remove()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of CRAM language models, and mixers that are not part of another module of these kinds."""
    if isinstance(module, (CRAMBlock, Mixer)):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)
