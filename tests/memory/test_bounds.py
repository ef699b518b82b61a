"""Calls with bounds on reads and writes: the same answers, and no size that depends on a gate."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from cramlab.memory import AdapterConfig, CRAMConfig, EpisodicMemoryConfig, RouterConfig
from cramlab.memory import layer as layer_module
from cramlab.mixer import Bounds, Routing
from cramlab.ops import dispatch

D, N_TOKENS = 16, 40


def build(write="salience", capacity=None, router="benefit"):
    memory = EpisodicMemoryConfig(n_heads=2, capacity=capacity, write=write, write_audit_frac=0.0)
    return CRAMConfig(episodic=memory, semantic=AdapterConfig(rank=12), router=RouterConfig(name=router)).build(D)


def make(**changes):
    """A layer whose gates open for some tokens and not for others."""
    layer = build(**changes)
    with torch.no_grad():
        trace = layer(*example()).trace
        if trace.gate_logit is not None:
            layer.gate.out.bias -= trace.gate_logit.median() / layer.gate.gain
        if layer.episodic.salience is not None:
            h = torch.nn.functional.layer_norm(example()[0], (D,))
            layer.episodic.salience.out.bias -= layer.episodic.salience(h).quantile(0.5)
    return layer


def example(n_batch=3):
    return torch.randn(n_batch, N_TOKENS, D), torch.rand(n_batch, N_TOKENS)


def gradients(layer, x, gaps, state, routing, weight):
    x = x.clone().requires_grad_()
    output = layer(x, gaps, state, routing=routing)
    loss = (output.y * weight).sum() + sum(output.aux.values()) + output.trace.gate_logit.square().mean()
    given = [x, *layer.parameters()]
    found = torch.autograd.grad(loss, given, allow_unused=True)
    return output, [torch.zeros_like(t) if g is None else g for t, g in zip(given, found, strict=True)]


@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("capacity", [None, 7, N_TOKENS + 5])
@pytest.mark.parametrize("n_batch", [1, 3])
def test_bounds_that_are_wide_enough_change_nothing(write, capacity, n_batch):
    layer = make(write=write, capacity=capacity).train()
    audits = torch.rand(n_batch, N_TOKENS) < 0.2
    states, routings = [None, None], [Routing(audits=audits), Routing(audits=audits, bounds=Bounds(N_TOKENS, N_TOKENS))]
    for _ in range(2):  # the second time with the buffer that the first has left
        x, gaps = example(n_batch)
        weight = torch.randn_like(x)
        (free, slow), (bounded, fast) = (
            gradients(layer, x, gaps, state, routing, weight) for state, routing in zip(states, routings, strict=True)
        )
        assert 0 < free.trace.scored.float().mean() < 1
        assert torch.allclose(free.y, bounded.y, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(free.trace[:3], bounded.trace[:3], strict=True))
        assert torch.allclose(free.trace.quality, bounded.trace.quality, atol=1e-5, equal_nan=True)
        assert free.aux.keys() == bounded.aux.keys()
        assert all(torch.allclose(free.aux[name], bounded.aux[name], rtol=1e-4) for name in free.aux)
        for a, b in zip(slow, fast, strict=True):
            assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)
        states = [
            type(output.state)(output.state.working.detach(), type(output.state.buffer)(
                *(part.detach() for part in output.state.buffer)))
            for output in (free, bounded)
        ]  # fmt: skip


def test_the_first_so_many_read_and_the_others_do_without():
    layer = make(write="all").eval()
    x, gaps = example()
    free = layer(x, gaps, routing=Routing(counterfactual=True))
    bounded = layer(x, gaps, routing=Routing(bounds=Bounds(reads=4, writes=1)))
    rank = free.trace.scored.cumsum(dim=1)
    assert (rank[:, -1] > 4).all()
    assert torch.equal(bounded.trace.scored, free.trace.scored & (rank <= 4))
    assert torch.allclose(bounded.y[rank <= 4], free.y[rank <= 4], atol=1e-5)
    assert torch.allclose(bounded.y[rank > 4], free.y_without_reads[rank > 4], atol=1e-5)


def test_the_first_so_many_are_written(monkeypatch):
    layer = make(write="salience").eval()
    x, gaps = example()
    bounded = layer(x, gaps, routing=Routing(bounds=Bounds(reads=N_TOKENS, writes=5)))
    rank = layer(x, gaps).trace.written.cumsum(dim=1)
    assert (rank[:, -1] > 5).all()
    assert (bounded.trace.written.sum(dim=1) == 5).all()
    assert bounded.state.buffer.n_places == 5
    monkeypatch.setattr(layer, "_writes", lambda *_: bounded.trace.written)
    assert torch.allclose(bounded.y, layer(x, gaps).y, atol=1e-5)


def test_without_anything_to_read_the_losses_are_zero_and_gradients_are_there():
    layer = make(write="salience").train()
    with torch.no_grad():
        layer.gate.out.bias.fill_(-100.0)
    output = layer(*example(), routing=Routing(bounds=Bounds(3, 3)))
    assert not output.trace.scored.any()
    assert output.aux["consolidation"] == 0
    assert torch.isnan(output.trace.quality).all()
    (output.y.sum() + sum(output.aux.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.episodic.parameters())


@pytest.mark.parametrize("bounds", [Bounds(0, 3), Bounds(3, 0)])
def test_bounds_below_one_are_refused(bounds):
    with pytest.raises(ValueError, match="at least 1"):
        build()(*example(), routing=Routing(bounds=bounds))


@pytest.mark.parametrize(("router", "read_all"), [("gumbel", False), ("benefit", True)])
def test_bounds_are_refused_where_every_token_reads(router, read_all):
    with pytest.raises(ValueError, match="every token reads"):
        build(router=router)(*example(), routing=Routing(bounds=Bounds(3, 3), read_all=read_all))


@pytest.mark.parametrize(("n_batch", "n_tokens"), [(2, 0), (0, 5), (2, 1), (1, 2)])
@pytest.mark.parametrize("write", ["all", "salience"])
def test_little_or_nothing_is_bounded_too(n_batch, n_tokens, write):
    layer = make(write=write).train()
    x, gaps = torch.randn(n_batch, n_tokens, D), torch.rand(n_batch, n_tokens)
    free, bounded = layer(x, gaps), layer(x, gaps, routing=Routing(bounds=Bounds(64, 64)))
    assert torch.allclose(free.y, bounded.y, atol=1e-5)
    assert bounded.state.buffer.n_places <= n_tokens


@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_kernels", [False, True])
def test_no_size_depends_on_what_the_gates_say(write, training, with_kernels, monkeypatch):
    """With tensors without values, any operation that needs one fails, as it would in a CUDA graph."""
    monkeypatch.setattr(layer_module, "checked_inputs", lambda x, gaps, *_: (x, gaps))  # left out of recordings
    monkeypatch.setattr(dispatch, "few_launches", lambda _: True)  # as on an accelerator
    monkeypatch.setattr(dispatch, "usable", lambda _: with_kernels)
    with FakeTensorMode():
        layer, (x, gaps) = build(write=write, capacity=30).train(training), example()

        def step(bounds):
            output = layer(x.requires_grad_(), gaps, routing=Routing(audits=gaps < 0.1, bounds=bounds))
            loss = output.y.sum() + sum(output.aux.values()) + output.trace.gate_logit.sum()
            torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
            return output

        output = step(Bounds(reads=6, writes=12))
        assert output.state.buffer.n_places == (12 if write == "salience" else 30)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            step(None)
