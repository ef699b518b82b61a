"""The window against the reference, in steps, with padding, with bounds; a token in its window does not read."""

import pytest
import torch

from cramlab.baselines import SlidingWindowConfig
from cramlab.config import ConfigError
from cramlab.memory import (
    AdapterConfig,
    CRAMConfig,
    EpisodicMemoryConfig,
    NothingConfig,
    RouterConfig,
    WorkingMemoryConfig,
)
from cramlab.memory import decode as module
from cramlab.memory.decode import Decoder, GraphDecoder
from cramlab.memory.reference import reference_layer
from cramlab.mixer import Bounds, Routing

D = 16
of_writes = pytest.mark.parametrize("write", ["all", "salience"])
of_routers = pytest.mark.parametrize("router", ["benefit", "always", "never"])
of_capacity = pytest.mark.parametrize("capacity", [None, 7])


def make(router="benefit", *, window=4, capacity=None, write="all", semantic=None, **episodic):
    config = CRAMConfig(
        working=WorkingMemoryConfig(d_state=8, n_timescales=4),
        episodic=EpisodicMemoryConfig(n_heads=2, capacity=capacity, write=write, **episodic),
        semantic=semantic or AdapterConfig(rank=12),
        router=RouterConfig(name=router, d_hidden=10),
        window=window,
    )
    layer = config.build(D).eval()
    with torch.no_grad():
        for gate in (getattr(layer, "gate", None), layer.episodic.salience):
            if gate is not None:  # some tokens pass, others do not
                gate.out.weight.normal_()
                gate.out.bias.zero_()
    return layer


def example(n_tokens, n_batch=3):
    return torch.randn(n_batch, n_tokens, D), torch.rand(n_batch, n_tokens) * 2


@of_writes
@of_routers
@of_capacity
@pytest.mark.parametrize("n_tokens", [1, 33])
def test_layer_and_gradients_equal_the_reference_implementation(write, router, capacity, n_tokens):
    layer, (x, gaps) = make(router, write=write, capacity=capacity, rope=True), example(n_tokens, 2)
    x.requires_grad_()
    valid = torch.ones(2, n_tokens, dtype=torch.bool)
    valid[0, 1:3] = valid[0, 20:26] = valid[1, 9:] = False
    output = layer(x, gaps, valid=valid)
    y, reads = reference_layer(layer, x, gaps, valid=valid)
    assert torch.allclose(output.y, y, atol=1e-5)
    assert torch.equal(output.trace.scored, reads)  # the window is no read
    weight, parameters = torch.randn_like(y), [x, *layer.parameters()]
    fast, slow = (torch.autograd.grad((t * weight).sum(), parameters, allow_unused=True) for t in (output.y, y))
    for a, b in zip(fast, slow, strict=True):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-3)


@of_writes
@of_routers
@of_capacity
def test_chunks_and_both_decoders_equal_one_pass(write, router, capacity, monkeypatch):
    monkeypatch.setattr(module, "_GROWTH", 4)
    layer, (x, gaps) = make(router, write=write, capacity=capacity), example(40)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, :7] = False
    with torch.no_grad():
        whole = layer(x, gaps, valid=valid)
        for cuts in ((1, 20), (20, 25), (13, 14)):
            state, parts, start = None, [], 0
            for end in (*cuts, 40):
                now = slice(start, end)
                output = layer(x[:, now], gaps[:, now], state, valid=valid[:, now])
                state, start = output.state, end
                parts.append(output.y)
            assert torch.allclose(torch.cat(parts, dim=1), whole.y, atol=1e-5)
        for n_before in (0, 20):
            before = layer(x[:, :n_before], gaps[:, :n_before], valid=valid[:, :n_before]).state
            whole = layer(x, gaps, valid=valid) if n_before else layer(x, gaps)
            for kind in (Decoder, GraphDecoder) if capacity else (Decoder,):
                decoder = kind(layer, before)
                steps = torch.stack([decoder.step(x[:, t], gaps[:, t]) for t in range(n_before, 40)], dim=1)
                assert torch.allclose(steps, whole.y[:, n_before:], atol=1e-5)


@of_writes
@pytest.mark.parametrize("training", [False, True])
def test_with_bounds_it_is_the_same_layer(write, training):
    layer, (x, gaps) = make(write=write), example(40)
    object.__setattr__(layer.config.episodic, "write_audit_frac", 0.0)
    layer.train(training)
    valid = torch.rand(3, 40) < 0.8
    plain = layer(x, gaps, valid=valid)
    bounded = layer(x, gaps, valid=valid, routing=Routing(bounds=Bounds(40, 40)))
    assert torch.allclose(bounded.y, plain.y, atol=1e-5)
    for name, loss in plain.aux.items():
        assert torch.allclose(bounded.aux[name], loss, atol=1e-5)


def test_without_reads_it_is_a_layer_of_sliding_window_attention():
    layer = make("never", semantic=NothingConfig(), window=5)
    x, gaps = example(40)
    h = layer.norm(layer.working(x, gaps, layer.working.initial_state(3))[0])
    control = SlidingWindowConfig(n_heads=2, window=5).build(D)
    memory = layer.episodic
    control.w_qkv.weight.data = torch.cat([memory.w_query.weight, memory.w_key.weight, memory.w_value.weight])
    control.w_out.weight.data = memory.w_out.weight
    output = layer(x, gaps)
    working = layer.working(x, gaps, layer.working.initial_state(3))[0]
    assert torch.allclose(output.y - working, control(h, gaps).y, atol=1e-5)
    assert not output.trace.scored.any()


def test_a_window_of_all_tokens_answers_like_a_read():
    layer, (x, gaps) = make("never", semantic=NothingConfig(), window=40), example(40)
    reading = make("always", window=None, semantic=NothingConfig())
    reading.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x, gaps).y, reading(x, gaps).y, atol=1e-5)


def test_the_output_without_reads_has_the_window_and_the_semantic_memory_learns_the_rest():
    layer, (x, gaps) = make(semantic=AdapterConfig(rank=12)), example(30)
    layer.train()
    every = layer(x, gaps, routing=Routing(read_all=True, counterfactual=True))
    none = layer(x, gaps, routing=Routing(skips=torch.ones_like(gaps, dtype=torch.bool)))
    assert torch.allclose(every.y_without_reads, none.y, atol=1e-6)
    missing = (every.y - none.y + semantic_answer(layer, x, gaps)).detach()
    answer = semantic_answer(layer, x, gaps)
    expected = (answer - missing).square().sum(-1).mean() / missing.square().sum(-1).mean()
    assert torch.allclose(every.aux["consolidation"], expected, atol=1e-5)


def semantic_answer(layer, x, gaps):
    return layer.semantic(layer.norm(layer.working(x, gaps, layer.working.initial_state(len(x)))[0]))


def test_the_gate_sees_the_window():
    layer, (x, gaps) = make(), example(30)
    before = layer(x, gaps).trace.gate_logit
    with torch.no_grad():
        layer.episodic.w_out.weight.mul_(3)
    after = layer(x, gaps).trace.gate_logit
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 9, "capacity": 8}, "model.mixer.window = 9 exceeds model.mixer.episodic.capacity = 8"),
        ({"window": 0}, "model.mixer.window = 0 must be at least 1, or None"),
        ({"router": "gumbel"}, 'model.mixer.window = 4 is of no use with the router "gumbel"'),
    ],
)
def test_impossible_windows_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)
