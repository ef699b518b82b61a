"""The reference implementation of `CRAMLayer`: one token at a time, equation by equation. Only tests import it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cramlab.memory.layer import CRAMLayer
from cramlab.memory.semantic import Nothing, Slots
from cramlab.memory.working import NoWorkingMemory, WorkingMemory
from cramlab.mixer import Path


def reference_layer(
    layer: CRAMLayer, x: Tensor, gaps: Tensor, *, valid: Tensor, reads: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Expected output of `layer` in evaluation mode, computed with its weights but none of its code paths.

    Args:
        layer: with any router but `random` and `oracle`, for which `reads` can stand in.
        x: (B, T, D).
        gaps: (B, T).
        valid: false on padding, bool (B, T).
        reads: tokens that read whatever the router decides, bool (B, T); None: none.

    Returns:
        Output (B, T, D), and the tokens that read, by the router's decision or by `reads`, bool (B, T).
    """
    outputs, read_masks = [], []
    for b in range(x.shape[0]):
        ys, used = [], []
        state = torch.zeros(layer.working.state_size)
        entries: list[tuple[Tensor, Tensor]] = []
        n_written = 0
        for t in range(x.shape[1]):
            if not valid[b, t]:
                ys.append(torch.zeros(layer.d_model))
                used.append(False)
                continue
            state, hidden, working = _working(layer, x[b, t], gaps[b, t], state)
            h = x[b, t] if layer.config.router.name == "gumbel" else layer.norm(working)
            position = n_written
            if _is_written(layer, h):
                n_written += 1
                entries.append((_matched(layer, h, position, "key"), layer.episodic.w_value(h)))
            if layer.config.episodic.capacity is not None:
                entries = entries[-layer.config.episodic.capacity :]
            forced = reads is not None and bool(reads[b, t])
            y, read = _answer(layer, (x[b, t], gaps[b, t], hidden), working, h, position, entries, forced)
            ys.append(y)
            used.append(read)
        outputs.append(torch.stack(ys))
        read_masks.append(torch.tensor(used))
    return torch.stack(outputs), torch.stack(read_masks)


def _working(layer: CRAMLayer, x: Tensor, gap: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """State `s = exp(-rate gap) s + u`, then h(K) by Eq. 2, and the output of the working memory."""
    memory = layer.working
    if isinstance(memory, NoWorkingMemory):
        return state, torch.zeros(1), x
    if not isinstance(memory, WorkingMemory):
        raise ValueError("working: this reference has leaky integrators only; see `delta_rule_by_tokens`")
    config = memory.config
    width = config.d_state // config.n_timescales
    decay = torch.stack([torch.exp(-memory.log_rate[i // width].exp() * gap) for i in range(config.d_state)])
    state = decay * state + memory.write(x)
    h = memory.norm(state)
    pace = torch.sigmoid(memory.w_tau.weight[:, 0] * torch.log(1 + gap) + memory.w_tau.bias)
    for _ in range(config.refine_steps):
        h = h + config.refine_dt * pace * torch.tanh(memory.w1.weight @ h + memory.w2(x))
    return state, h, memory.w_out(h) + x


def _is_written(layer: CRAMLayer, h: Tensor) -> bool:
    """True if the write gate lets the token pass, or there is none."""
    gate = layer.episodic.salience
    if gate is None:
        return True
    hidden = gate.hidden(h)
    return bool(gate.out(hidden * torch.sigmoid(hidden)) > 0)


def _matched(layer: CRAMLayer, h: Tensor, position: int, which: str) -> Tensor:
    """The query or the key of a token, head by head and channel by channel."""
    episodic, config = layer.episodic, layer.episodic.config
    projected = (episodic.w_query if which == "query" else episodic.w_key)(h)
    heads = []
    for head in projected.split(layer.d_model // config.n_heads):
        if config.qk_norm:
            scale = getattr(episodic.matching, f"{which}_scale")
            head = head / torch.sqrt((head**2).mean() + 1e-6) * scale
        if config.rope:
            half, turned = len(head) // 2, list(head)
            for i in range(half):
                angle = position / config.rope_theta ** (i / half)
                turned[i] = head[i] * math.cos(angle) - head[half + i] * math.sin(angle)
                turned[half + i] = head[i] * math.sin(angle) + head[half + i] * math.cos(angle)
            head = torch.stack(turned)
        heads.append(head)
    return torch.cat(heads)


def _retrieve(layer: CRAMLayer, h: Tensor, position: int, entries: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Eq. 3, head by head; zero if nothing has been written."""
    if not entries:
        return torch.zeros_like(h)
    n_heads = layer.config.episodic.n_heads
    d_head = layer.d_model // n_heads
    query = _matched(layer, h, position, "query")
    heads = []
    for i in range(n_heads):
        part = slice(i * d_head, (i + 1) * d_head)
        scores = torch.stack([query[part] @ key[part] / math.sqrt(d_head) for key, _ in entries])
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        heads.append(
            sum((w * value[part] for w, (_, value) in zip(weights, entries, strict=True)), torch.zeros(d_head))
        )
    return layer.episodic.w_out(torch.cat(heads))


def _know(layer: CRAMLayer, h: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the semantic memory (Eq. 4), and the hidden activations that the gate uses."""
    memory = layer.semantic
    if isinstance(memory, Nothing):
        return torch.zeros_like(h), torch.zeros(0)
    if isinstance(memory, Slots):
        query = memory.w_query(h)
        matches = torch.stack([query @ key / (query.norm() * key.norm()) for key in memory.keys])
        odds = (memory.log_sharpness.exp() * matches).exp()
        values = [share * value for share, value in zip(odds / odds.sum(), memory.values, strict=True)]
        return memory.log_size.exp() * sum(values, torch.zeros_like(h)) + memory.bias, matches
    recognised = memory.w_down(h).clamp(min=0)
    return memory.w_up(recognised), recognised


def _answer(
    layer: CRAMLayer,
    token: tuple[Tensor, Tensor, Tensor],
    working: Tensor,
    h: Tensor,
    position: int,
    entries: list[tuple[Tensor, Tensor]],
    forced: bool,
) -> tuple[Tensor, bool]:
    """Output of the layer for one token (x, gap, h(K)), and whether it used a read."""
    value, recognised = _know(layer, h)
    name = layer.config.router.name
    if layer.config.window is not None:
        nearby = _retrieve(layer, h, position, entries[-layer.config.window :])
        value, recognised = value + nearby, torch.cat([recognised, nearby])
    if name == "gumbel":
        return _answer_by_path(layer, token, working, _retrieve(layer, h, position, entries), value)
    if name == "benefit":
        gate = layer.gate
        hidden = gate.hidden(torch.cat([h, recognised]))
        forced = forced or bool(gate.gain * gate.out(hidden * torch.sigmoid(hidden)) > 0)
    read = (forced or name == "always") and bool(entries)
    return working + (_retrieve(layer, h, position, entries) if read else value), read


def _answer_by_path(
    layer: CRAMLayer, token: tuple[Tensor, Tensor, Tensor], working: Tensor, retrieved: Tensor, value: Tensor
) -> tuple[Tensor, bool]:
    """Output by Eq. 6 and 7 without sampling: that of the most probable path."""
    x, gap, hidden_state = token
    router = layer.gumbel
    q = torch.exp(-((value - retrieved) ** 2).sum() / (retrieved**2).sum() / layer.config.router.sigma**2)
    size = torch.sqrt((hidden_state**2).mean())
    uncertainty = torch.log(1 + torch.exp(router.uncertainty(x)[0]))
    hidden = router.hidden(torch.stack([torch.log(1 + gap), size, q, uncertainty]))
    path = int(router.out(hidden * torch.sigmoid(hidden)).argmax())
    return (working, retrieved, value)[path], path == Path.EPISODIC and bool(retrieved.any())
