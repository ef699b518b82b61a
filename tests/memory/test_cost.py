"""The stated cost of a CRAM layer against what PyTorch's counter sees executed."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cramlab.baselines import TransformerConfig
from cramlab.memory import (
    AdapterConfig,
    CRAMConfig,
    EpisodicMemoryConfig,
    RouterConfig,
    SlotsConfig,
    WorkingMemoryConfig,
    readers,
)
from cramlab.memory.cost import break_even_length
from cramlab.mixer import Path, Routing
from cramlab.ops.read.windows import tiles, window_attention

D = 16


def make(router="benefit", *, semantic=None, capacity=None, write="all", working=True, window=None):
    config = CRAMConfig(
        working=WorkingMemoryConfig(d_state=8, n_timescales=4, refine_steps=2) if working else None,
        episodic=EpisodicMemoryConfig(n_heads=2, capacity=capacity, write=write),
        semantic=semantic or AdapterConfig(rank=12),
        router=RouterConfig(name=router, d_hidden=10),
        window=window,
    )
    layer = config.build(D).eval()
    for gate in (getattr(layer, "gate", None), layer.episodic.salience):
        if gate is not None:  # a fresh gate says the same of all tokens
            torch.nn.init.normal_(gate.out.weight)
            torch.nn.init.zeros_(gate.out.bias)
    return layer


def count(layer, n_tokens, monkeypatch, *, training=False):
    """FLOPs that the counter sees, those of them that are scores, and the traces."""
    fused, tiled = [], []
    real = F.scaled_dot_product_attention

    def counting(q, k, *args, **kwargs):
        fused.append(q.shape[0] * q.shape[2] * k.shape[2])
        return real(q, k, *args, **kwargs)

    def counting_windows(q, k, v, first, last, n_heads):
        found = [tile.n_pairs for tile in tiles(first, last)]
        if len(found) > 1:
            tiled.append(sum(found))
        return window_attention(q, k, v, first, last, n_heads)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    monkeypatch.setattr(readers, "window_attention", counting_windows)
    x, gaps = torch.randn(1, n_tokens, D, requires_grad=training), torch.rand(1, n_tokens)
    reads = torch.arange(n_tokens)[None] % 10 == 4  # evenly spread
    layer.train(training)
    # The fused kernel counts as nothing; the plain one as two products over all pairs of readers and places.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = layer(x, gaps, routing=Routing(oracle_reads=reads))
        if training:
            loss = output.y.sum() + sum(output.aux.values())
            if output.trace.gate_logit is not None:
                loss = loss + output.trace.gate_logit.sum()
            loss.backward()
    monkeypatch.undo()
    # Forward two products; backward four, and for tiles the scores once more.
    products = 6 * sum(fused) + 7 * sum(tiled) if training else 2 * sum(fused + tiled)
    return counter.get_total_flops(), 2 * D * products, output


@pytest.mark.parametrize("semantic", [AdapterConfig(rank=3), SlotsConfig(n_slots=10, d_match=4)])
@pytest.mark.parametrize(
    ("router", "training"),
    [(r, t) for r in ("benefit", "gumbel", "always", "oracle") for t in (False, True)] + [("never", False)],
)
@pytest.mark.parametrize("capacity", [None, 16])
@pytest.mark.parametrize("write", ["all", "salience"])
def test_everything_but_the_scores_is_stated_exactly(router, semantic, capacity, write, training, monkeypatch):
    layer = make(router, semantic=semantic, capacity=capacity, write=write)
    counted, scores, output = count(layer, 128, monkeypatch, training=training)
    trace = output.trace
    by_rule = int((trace.path == Path.EPISODIC).sum())
    cost = layer.cost(
        128,
        read_frac=trace.scored.float().mean().item(),
        write_frac=1.0 if trace.written is None else trace.written.float().mean().item(),
        training=training,
    )
    known = counted - scores
    stated = cost.flops - cost.parts["scores"]
    if training and write == "salience":  # the use is taken of those who read by rule, over all places
        known -= 2 * D * by_rule * (int(trace.written.sum()) + D)
        stated -= cost.parts["write gate's labels"]
    if training and router == "gumbel":  # scores all, consolidates those that it sends to episodic memory
        stated -= cost.parts["consolidation"] * (1 - max(by_rule, 1) / cost.reads)
    assert stated == pytest.approx(known, rel=1e-6)
    assert sum(cost.parts.values()) == cost.flops


@pytest.mark.parametrize("n_tokens", [100, 500, 2000])
@pytest.mark.parametrize("capacity", [None, 64])
@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("training", [False, True])
def test_scores_of_evenly_spread_reads_are_stated_closely(n_tokens, capacity, write, training, monkeypatch):
    layer = make("oracle", capacity=capacity, write=write)
    _, scores, output = count(layer, n_tokens, monkeypatch, training=training)
    trace = output.trace
    write_frac = 1.0 if trace.written is None else trace.written.float().mean().item()
    cost = layer.cost(n_tokens, read_frac=trace.scored.float().mean().item(), write_frac=write_frac, training=training)
    assert cost.parts["scores"] == pytest.approx(scores, rel=0.03 if write == "all" else 0.2)


@pytest.mark.parametrize(("router", "n_tokens", "training"), [
    ("benefit", 128, False), ("benefit", 128, True), ("oracle", 1000, True), ("never", 1000, False),
])  # fmt: skip
def test_a_window_is_counted_as_executed_and_not_as_reads(router, n_tokens, training, monkeypatch):
    layer, without = make(router, window=16), make(router)
    counted, scores, output = count(layer, n_tokens, monkeypatch, training=training)
    share = output.trace.scored.float().mean().item()
    cost, plain = (one.cost(n_tokens, read_frac=share, training=training) for one in (layer, without))
    assert cost.reads == plain.reads == pytest.approx(int(output.trace.scored.sum()))
    assert cost.read_flops == plain.read_flops
    projections = (3 if training else 1) * 2 * 2 * D * D * n_tokens
    pairs = cost.parts["scores"] + cost.parts["window"] - projections
    assert pairs == pytest.approx(scores, rel=0.05)
    assert cost.flops - pairs == pytest.approx(counted - scores, rel=1e-6)


def test_the_counter_agrees_with_arithmetic_by_hand():
    """d = 16, 10 tokens, no working memory, adapter of rank 3, everybody reads: each product written out."""
    layer = make("always", semantic=AdapterConfig(rank=3), working=False)
    cost = layer.cost(10)
    assert cost.parts["keys and values"] == 10 * 2 * (2 * 16 * 16)
    assert cost.parts["queries and output"] == 10 * 2 * (2 * 16 * 16)
    assert cost.parts["semantic memory"] == 10 * 2 * (2 * 16 * 3)
    assert cost.parts["scores"] == (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10) * (2 * 16 + 2 * 16)
    assert cost.reads == 10


@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("capacity", [None, 32])
def test_stated_bytes_are_those_that_are_held(write, capacity, monkeypatch):
    layer = make("oracle", write=write, capacity=capacity)
    _, _, output = count(layer, 100, monkeypatch)
    trace, state = output.trace, output.state
    write_frac = 1.0 if trace.written is None else trace.written.float().mean().item()
    held = state.working.numel() * 4 + state.buffer.n_bytes
    assert layer.cost(100, write_frac=write_frac).state_bytes == held
    assert layer.cost(100).parameter_bytes == sum(p.numel() * 4 for p in layer.parameters())


def test_cost_falls_with_reads_and_writes():
    layer = make("benefit", write="salience")
    assert layer.cost(100, read_frac=0.0).read_flops == 0
    assert layer.cost(100, read_frac=0.1).flops < layer.cost(100, read_frac=0.3).flops < layer.cost(100).flops
    assert layer.cost(100, write_frac=0.1).flops < layer.cost(100).flops
    assert layer.cost(100, write_frac=0.1).state_bytes < layer.cost(100).state_bytes
    assert make(capacity=10).cost(100).state_bytes < make().cost(100).state_bytes
    assert layer.cost(100, training=True).flops > 2 * layer.cost(100).flops


def test_break_even_is_where_the_curves_cross():
    cram, control = make("benefit"), TransformerConfig(n_heads=2).build(D)
    length = break_even_length(lambda n: cram.cost(n, read_frac=0.02).flops, lambda n: control.cost(n).flops)
    assert length is not None
    assert cram.cost(length, read_frac=0.02).flops <= control.cost(length).flops
    assert cram.cost(length // 2, read_frac=0.02).flops > control.cost(length // 2).flops
    assert break_even_length(lambda n: 2.0 * n, lambda n: 1.0 * n) is None
