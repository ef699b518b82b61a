import dataclasses
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from cramlab.baselines import TransformerConfig
from cramlab.memory import (
    AdapterConfig,
    CRAMConfig,
    EpisodicMemoryConfig,
    RouterConfig,
    SlotsConfig,
    WorkingMemoryConfig,
)
from cramlab.memory.consolidation import consolidation_loss, quality
from cramlab.memory.readers import select_readers
from cramlab.memory.reference import reference_layer
from cramlab.mixer import Bounds, Path, Routing
from cramlab.ops import dispatch
from cramlab.ops.read import windows as window_attention

D = 16
ROUTERS = ("benefit", "gumbel", "always", "never")
LENGTHS = (1, 2, 63, 100)
WRITES = ("all", "salience")


def make(router="benefit", *, capacity=None, semantic=None, n_heads=2, write="all", **router_changes):
    config = CRAMConfig(
        working=WorkingMemoryConfig(d_state=8, n_timescales=4, refine_steps=2),
        episodic=EpisodicMemoryConfig(n_heads=n_heads, capacity=capacity, write=write),
        semantic=semantic or AdapterConfig(rank=12),
        router=RouterConfig(name=router, d_hidden=10, **router_changes),
    )
    layer = config.build(D).eval()
    if router == "benefit":  # a fresh gate says the same of all tokens; move its threshold to their middle
        logits = layer(*example(50)).trace.gate_logit
        with torch.no_grad():
            layer.gate.out.bias -= logits.median() / layer.gate.gain
    if write == "salience":  # likewise: write the upper third
        logits = layer.episodic.salience(torch.nn.functional.layer_norm(example(200)[0], (D,)))
        with torch.no_grad():
            layer.episodic.salience.out.bias -= logits.quantile(0.67)
    return layer


def example(n_tokens, n_batch=3):
    return torch.randn(n_batch, n_tokens, D), torch.rand(n_batch, n_tokens) * 2


def all_valid(gaps):
    return torch.ones_like(gaps, dtype=torch.bool)


@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize("write", WRITES)
def test_layer_equals_its_reference_implementation(router, n_tokens, capacity, write):
    layer = make(router, capacity=capacity, write=write)
    x, gaps = example(n_tokens, n_batch=2)
    output = layer(x, gaps)
    if router == "benefit" and n_tokens > 2:
        assert 0.15 < output.trace.attended.float().mean() < 0.8
    y, reads = reference_layer(layer, x, gaps, valid=all_valid(gaps))
    assert torch.allclose(output.y, y, atol=1e-5)
    assert torch.equal(output.trace.attended, reads)


@pytest.mark.parametrize(
    "semantic", [AdapterConfig(rank=12), AdapterConfig(rank=None), SlotsConfig(n_slots=9, d_match=5)]
)
@pytest.mark.parametrize("router", ["benefit", "gumbel", "always"])
@pytest.mark.parametrize("write", WRITES)
def test_gradients_equal_those_of_the_reference_implementation(router, semantic, write):
    layer = make(router, capacity=20, semantic=semantic, write=write)
    x, gaps = example(33, n_batch=2)
    x.requires_grad_()
    forced = torch.rand(gaps.shape) < 0.3
    weight = torch.randn(2, 33, D)
    routing = Routing(audits=forced)
    if router == "gumbel":
        forced, routing = None, Routing()
    parameters = [x, *layer.parameters()]
    fast = torch.autograd.grad((layer(x, gaps, routing=routing).y * weight).sum(), parameters, allow_unused=True)
    y, _ = reference_layer(layer, x, gaps, valid=all_valid(gaps), reads=forced)
    slow = torch.autograd.grad((y * weight).sum(), parameters, allow_unused=True)
    for a, b in zip(fast, slow, strict=True):
        a = torch.zeros(()) if a is None else a
        b = torch.zeros(()) if b is None else b
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("write", WRITES)
def test_one_token_steps_equal_one_pass(router, capacity, write):
    layer = make(router, capacity=capacity, write=write)
    x, gaps = example(40)
    whole = layer(x, gaps)
    state, parts, reads = None, [], []
    for t in range(40):
        output = layer(x[:, t : t + 1], gaps[:, t : t + 1], state)
        state = output.state
        parts.append(output.y)
        reads.append(output.trace.attended)
        if capacity is not None:
            assert state.buffer.n_places <= capacity
    assert torch.allclose(torch.cat(parts, dim=1), whole.y, atol=1e-5)
    assert torch.equal(torch.cat(reads, dim=1), whole.trace.attended)
    assert torch.allclose(state.working, whole.state.working, atol=1e-5)
    assert torch.allclose(state.buffer.keys, whole.state.buffer.keys, atol=1e-5)
    filled = state.buffer.filled
    assert torch.equal(filled, whole.state.buffer.filled)
    assert torch.allclose(state.buffer.times[filled], whole.state.buffer.times[filled], atol=1e-4)


@pytest.mark.parametrize("chunks", [(1, 39), (39, 1), (13, 14, 13)])
@pytest.mark.parametrize("write", WRITES)
def test_uneven_chunks_equal_one_pass(chunks, write):
    layer = make(capacity=9, write=write)
    x, gaps = example(40)
    state, parts, start = None, [], 0
    for n in chunks:
        output = layer(x[:, start : start + n], gaps[:, start : start + n], state)
        state, start = output.state, start + n
        parts.append(output.y)
    assert torch.allclose(torch.cat(parts, dim=1), layer(x, gaps).y, atol=1e-5)


PADDINGS = {
    "left": lambda n: torch.arange(n) >= 6,
    "right": lambda n: torch.arange(n) < n - 6,
    "interior": lambda n: (torch.arange(n) < 8) | (torch.arange(n) >= 14),
    "everything": lambda n: torch.zeros(n, dtype=torch.bool),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_padding_never_leaks(padding, router, n_batch, capacity, warm, write):
    layer = make(router, capacity=capacity, write=write)
    x, gaps = example(25, n_batch)
    state = layer(*example(11, n_batch)).state if warm else None
    valid = all_valid(gaps)
    valid[0] = PADDINGS[padding](25)
    padded = layer(x, gaps, state, valid=valid)
    for rubbish, gap in ((1e3, 7.0), (float("nan"), float("nan"))):
        x_rubbish, gap_rubbish = torch.where(valid[..., None], x, rubbish), torch.where(valid, gaps, gap)
        assert torch.equal(layer(x_rubbish, gap_rubbish, state, valid=valid).y, padded.y)
    assert (padded.y[~valid] == 0).all()
    if not warm:
        slow, reads = reference_layer(layer, x, gaps, valid=valid)
        assert torch.allclose(padded.y, slow, atol=1e-5)
        assert torch.equal(padded.trace.attended, reads)
    assert not padded.trace.scored[~valid].any()
    keep = valid[0]
    first = (
        None if state is None else type(state)(state.working[:1], type(state.buffer)(*(t[:1] for t in state.buffer)))
    )
    alone = layer(x[:1, keep], gaps[:1, keep], first) if keep.any() else None
    if alone is not None:
        assert torch.allclose(padded.y[0, keep], alone.y[0], atol=1e-5)
        assert torch.allclose(padded.state.working[0], alone.state.working[0], atol=1e-5)
        filled = padded.state.buffer.filled[0]
        other = alone.state.buffer.filled[0]
        assert torch.allclose(padded.state.buffer.keys[0, filled], alone.state.buffer.keys[0, other], atol=1e-5)
        assert torch.allclose(padded.state.buffer.times[0, filled], alone.state.buffer.times[0, other], atol=1e-4)
    following = torch.randn(n_batch, 4, D), torch.rand(n_batch, 4)
    assert torch.isfinite(layer(*following, padded.state).y).all()
    if alone is not None:
        expected = layer(following[0][:1], following[1][:1], alone.state).y
        assert torch.allclose(layer(*following, padded.state).y[:1], expected, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("write", WRITES)
def test_the_future_does_not_reach_the_past(router, write):
    layer = make(router, write=write)
    x, gaps = example(30)
    changed, later = x.clone(), gaps.clone()
    changed[:, 20:] = torch.randn(3, 10, D)
    later[:, 20:] = torch.rand(3, 10)
    assert torch.allclose(layer(changed, later).y[:, :20], layer(x, gaps).y[:, :20], atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_sequences_do_not_reach_each_other(router):
    layer = make(router)
    x, gaps = example(30)
    assert torch.allclose(layer(x, gaps).y[1:2], layer(x[1:2], gaps[1:2]).y, atol=1e-5)


def test_batch_size_equal_to_width_is_nothing_special():
    layer = make(capacity=6)
    x, gaps = example(D, n_batch=D)
    output = layer(x, gaps)
    for b in (0, D - 1):
        assert torch.allclose(output.y[b], layer(x[b : b + 1], gaps[b : b + 1]).y[0], atol=1e-5)


def test_always_reading_an_unbounded_buffer_is_plain_attention():
    layer = make("always", n_heads=4)
    x, gaps = example(50)
    working, _, _ = layer.working(x, gaps, layer.working.initial_state(3))
    h = layer.norm(working)
    memory = layer.episodic
    q, k, v = (w(h).unflatten(-1, (4, -1)).transpose(1, 2) for w in (memory.w_query, memory.w_key, memory.w_value))
    attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert torch.equal(layer(x, gaps).y, working + memory.w_out(attention))


def test_routing_off_is_bit_identical_to_the_layer_without_episodic_memory():
    layer = make("never")
    x, gaps = example(50)
    working, _, _ = layer.working(x, gaps, layer.working.initial_state(3))
    assert torch.equal(layer(x, gaps).y, working + layer.semantic(layer.norm(working)))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [False, True])
def test_forward_mutates_nothing(router, training):
    layer = make(router).train(training)
    x, gaps = example(20)
    state = layer(x, gaps).state
    kept = [t.clone() for t in (x, gaps, state.working, *state.buffer)]
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    attributes = set(vars(layer))
    layer(x, gaps, state, routing=Routing(counterfactual=True, audits=torch.rand(gaps.shape) < 0.5))
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, gaps, state.working, *state.buffer), strict=True))
    assert all(torch.equal(weights[name], value) for name, value in layer.state_dict().items())
    assert set(vars(layer)) == attributes


def test_the_gate_decides_without_a_read():
    """Scrambling the episodic memory changes answers, never decisions."""
    layer = make()
    x, gaps = example(60)
    before = layer(x, gaps).trace
    with torch.no_grad():
        for parameter in layer.episodic.parameters():
            parameter.normal_()
    assert torch.equal(layer(x, gaps).trace.attended, before.attended)
    assert torch.equal(before.attended, before.scored)


@pytest.mark.parametrize("write", WRITES)
def test_training_and_evaluation_decide_by_the_same_rule(write):
    layer = make(write=write)
    layer.config = dataclasses.replace(layer.config, episodic=EpisodicMemoryConfig(write=write, write_audit_frac=0.0))
    x, gaps = example(60)
    audits = torch.rand(gaps.shape) < 0.3
    decided = [layer.train(mode)(x, gaps, routing=Routing(audits=audits)).trace for mode in (False, True)]
    assert 0.1 < (decided[0].path == Path.EPISODIC).float().mean() < 0.9
    assert torch.equal(decided[0].path, decided[1].path)
    assert write == "all" or torch.equal(decided[0].written, decided[1].written)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("router", ["benefit", "always", "never", "random"])
@pytest.mark.parametrize("training", [False, True])
def test_as_many_tokens_are_scored_as_are_counted(router, write, training, monkeypatch):
    """`reads_frac` is the mean of `scored`; here it is compared with what the score computation is given."""
    layer = make(router, write=write, capacity=30, random_frac=0.2).train(training)
    x, gaps = example(200)
    valid = torch.rand(gaps.shape) < 0.9
    n_scored, fused = [], F.scaled_dot_product_attention

    def counting(q, *args, **kwargs):
        n_scored.append(q.shape[0] * q.shape[2])
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    monkeypatch.setattr(window_attention, "_WORTH_A_TILE", float("inf"))  # one tile, so that each reader counts once
    trace = layer(x, gaps, valid=valid, routing=Routing(audits=torch.rand(gaps.shape) < 0.1)).trace
    assert sum(n_scored) == int(trace.scored.sum())
    assert (sum(n_scored) > 0) == (router != "never")
    assert not trace.scored[~valid].any()


def test_the_gumbel_router_is_charged_for_every_read_that_q_needs():
    trace = make("gumbel")(*example(60)).trace
    assert trace.scored.all()
    assert not trace.attended.all()


def test_gumbel_samples_come_from_the_given_generator():
    layer = make("gumbel")
    x, gaps = example(30)

    def draw(seed):
        return layer(x, gaps, routing=Routing(temperature=1.0, generator=torch.Generator().manual_seed(seed))).y

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_router_reads_at_its_rate_and_oracle_reads_what_it_is_told():
    x, gaps = example(400)
    layer = make("random", random_frac=0.25)
    trace = layer(x, gaps, routing=Routing(generator=torch.Generator().manual_seed(0))).trace
    assert trace.attended.float().mean().item() == pytest.approx(0.25, abs=0.06)
    told = torch.rand(gaps.shape) < 0.1
    assert torch.equal(make("oracle")(x, gaps, routing=Routing(oracle_reads=told)).trace.attended, told)
    across = told.T.contiguous().T  # the same reads, laid out by token
    assert torch.equal(make("oracle")(x, gaps, routing=Routing(oracle_reads=across)).trace.attended, told)
    with pytest.raises(ValueError, match="oracle_reads"):
        make("oracle")(x, gaps)


def test_counterfactual_is_the_output_without_reads():
    layer, twin = make("benefit"), make("never")
    twin.load_state_dict({n: v for n, v in layer.state_dict().items() if not n.startswith("gate")})
    x, gaps = example(30)
    output = layer(x, gaps, routing=Routing(read_all=True, counterfactual=True))
    assert output.trace.attended.all()
    assert torch.equal(output.y_without_reads, twin(x, gaps).y)


def test_consolidation_teaches_the_semantic_memory_and_nothing_else():
    layer = make().train()
    x, gaps = example(30)
    x.requires_grad_()
    aux = layer(x, gaps, routing=Routing(read_all=True)).aux
    aux["consolidation"].backward()
    assert x.grad is None
    taught = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert taught
    assert all(name.startswith("semantic.") for name in taught)


@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("n_batch", [1, 3])
def test_what_runs_on_an_accelerator_is_the_same(write, n_batch, monkeypatch):
    """Outputs, losses, gradients and state, over two calls, the second with padding; without the kernels."""
    layer = make(write=write).train()
    x, gaps = torch.randn(n_batch, 90, D), torch.rand(n_batch, 90)
    valid = torch.rand(n_batch, 50) < 0.8

    def run(few):
        monkeypatch.setattr(dispatch, "few_launches", lambda device: few)
        torch.manual_seed(0)
        first = layer(x[:, :40], gaps[:, :40])
        second = layer(x[:, 40:], gaps[:, 40:], first.state, valid=valid)
        loss = sum(out.y.square().mean() + sum(out.aux.values()) for out in (first, second))
        grads = torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
        seen = [second.state.buffer.filled.sum(dim=1), second.trace.quality.nan_to_num(-1)]
        return [first.y, second.y, second.state.working, *seen, *first.aux.values(), *grads]

    for slow, fast in zip(run(False), run(True), strict=True):
        assert slow is fast or torch.allclose(slow.float(), fast.float(), atol=1e-5)


def test_without_any_read_the_consolidation_loss_is_zero():
    layer = make("never").train()
    assert layer(*example(5)).aux["consolidation"].item() == 0.0


def test_quality_and_consolidation_loss_by_hand():
    retrieved = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    answer = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    q = quality(answer, retrieved, sigma=2.0)
    assert q[0].item() == 1.0
    assert q[1].item() == pytest.approx(torch.tensor(-0.25).exp().item())
    assert consolidation_loss(answer, retrieved).item() == pytest.approx((0 + 1) / (25 + 1))


def test_path_names_the_memory_that_answered():
    trace = make("always")(*example(5)).trace
    assert (trace.path == Path.EPISODIC).all()
    assert (make("never")(*example(5)).trace.path == Path.SEMANTIC).all()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("write", WRITES)
def test_autocast_to_bf16_works_and_stays_close(router, write):
    layer = make(router, write=write).train()
    x, gaps = example(30)
    routing = Routing(audits=torch.rand(gaps.shape) < 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, gaps, routing=routing).y
        y.sum().backward()
    assert torch.isfinite(y).all()
    if router in ("always", "never") and write == "all":  # a gate near its threshold may change its mind
        assert torch.allclose(y.float(), layer(x, gaps).y, atol=0.1)


def test_audits_are_for_the_gate_that_learns():
    x, gaps = example(30)
    everyone = Routing(audits=torch.ones(gaps.shape, dtype=torch.bool))
    assert make("benefit")(x, gaps, routing=everyone).trace.scored.all()
    assert not make("never")(x, gaps, routing=everyone).trace.scored.any()


def test_a_state_of_other_sequences_is_refused():
    layer = make()
    state = layer(*example(5)).state
    with pytest.raises(ValueError, match="state holds 3 sequences and x 2"):
        layer(*example(5, n_batch=2), state)


def test_no_tokens_are_no_trouble():
    layer = make("never")
    output = layer(*example(0))
    assert output.y.shape == (3, 0, D)
    assert torch.equal(output.state.working, layer.working.initial_state(3))


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: EpisodicMemoryConfig(capacity=0), "episodic.capacity"),
        (lambda: EpisodicMemoryConfig(n_heads=0), "episodic.n_heads"),
        (lambda: make(n_heads=3), "n_heads"),
        (lambda: RouterConfig(name="benefits"), "router.name"),
        (lambda: RouterConfig(random_frac=2.0), "router.random_frac"),
        (lambda: RouterConfig(sigma=0.0), "router.sigma"),
        (lambda: AdapterConfig(rank=0), "semantic.rank"),
        (lambda: SlotsConfig(n_slots=0), "semantic.n_slots"),
        (lambda: SlotsConfig(sharpness=0.0), "semantic.sharpness"),
    ],
)
def test_bad_sizes_are_refused_by_name(build, field):
    with pytest.raises(ValueError, match=field):
        build()


@pytest.mark.parametrize("gap", [-1.0, float("nan"), float("inf")])
def test_impossible_gaps_are_refused_except_on_padding(gap):
    layer = make()
    x, gaps = example(5)
    gaps[1, 3] = gap
    with pytest.raises(ValueError, match="gaps holds"):
        layer(x, gaps)
    valid = all_valid(gaps)
    valid[1, 3] = False
    assert torch.isfinite(layer(x, gaps, valid=valid).y).all()
    with pytest.raises(ValueError, match="gaps holds"):
        TransformerConfig(n_heads=2).build(D)(x, gaps)


def test_inputs_that_do_not_fit_are_refused_by_name():
    layer = make()
    x, gaps = example(5)
    with pytest.raises(ValueError, match="x has shape"):
        layer(x[..., :3], gaps)
    with pytest.raises(ValueError, match="gaps has shape"):
        layer(x, gaps[:, :3])
    with pytest.raises(ValueError, match="valid has shape"):
        layer(x, gaps, valid=all_valid(gaps)[:1])


@pytest.mark.parametrize("size", [0.0, 1e12])
def test_zero_and_huge_gaps_are_nothing_special(size):
    layer = make()
    x, gaps = example(20)
    gaps = torch.full_like(gaps, size)
    y, _ = reference_layer(layer, x, gaps, valid=all_valid(gaps))
    assert torch.allclose(layer(x, gaps).y, y, atol=1e-5)


def test_paper_variant_is_the_paper_s():
    config = CRAMConfig.paper()
    assert config.router.name == "gumbel"
    layer = dataclasses.replace(config).build(64)
    assert layer.semantic.w_down.out_features == 64 // 16


@pytest.mark.parametrize("router", ["benefit", "always", "never", "gumbel"])
@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("bounds", [None, Bounds(reads=9, writes=11)])
def test_losses_by_sequence_are_those_of_each_sequence_alone(router, write, bounds):
    """Sums over tokens: of one sequence, its mean times its tokens that count."""
    if router == "gumbel" and bounds is not None:
        return
    episodic = EpisodicMemoryConfig(n_heads=2, capacity=6, write=write, write_audit_frac=0.0)
    config = CRAMConfig(episodic=episodic, semantic=AdapterConfig(rank=8), router=RouterConfig(name=router))
    layer = config.build(16).train()
    for gate in (getattr(layer, "gate", None), layer.episodic.salience):
        if gate is not None:
            torch.nn.init.normal_(gate.out.weight, std=3.0)
            torch.nn.init.zeros_(gate.out.bias)
    x, gaps = torch.randn(4, 14, 16), torch.rand(4, 14)
    valid = torch.arange(14) < torch.tensor([[14], [9], [0], [5]])
    whole = layer(x, gaps, valid=valid, routing=Routing(by_sequence=True, bounds=bounds))
    for row in range(4):
        given = x[row : row + 1], gaps[row : row + 1]
        routing = Routing(by_sequence=True, bounds=bounds)
        alone = layer(*given, valid=valid[row : row + 1], routing=routing)
        mean = layer(*given, valid=valid[row : row + 1], routing=Routing(bounds=bounds))
        counts = {"consolidation": alone.trace.scored.sum(), "salience": alone.trace.written.sum()}
        if router == "gumbel":
            counts["consolidation"] = ((alone.trace.path == int(Path.EPISODIC)) & alone.trace.scored).sum()
            counts["episodic_use"] = counts["semantic_use"] = alone.trace.scored.sum()
        assert whole.aux.keys() == alone.aux.keys() == mean.aux.keys()
        for name, loss in alone.aux.items():
            torch.testing.assert_close(whole.aux[name][row], loss[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(loss[0], mean.aux[name] * counts[name], atol=1e-5, rtol=1e-4)
    sum(loss.sum() for loss in whole.aux.values()).backward()


@pytest.mark.parametrize(("router", "reads"), [("never", False), ("always", True)])
def test_readers_are_counted_only_if_data_decide_who_reads(router, reads, monkeypatch):
    """A count waits for the device. Of skips only the data tell how many tokens are left to read."""
    count = mock.Mock(side_effect=select_readers)
    monkeypatch.setattr("cramlab.memory.layer.select_readers", count)
    layer, (x, gaps) = make(router).train(), example(12)
    assert bool((layer(x, gaps).trace.scored == reads).all())
    count.assert_not_called()
    skips = torch.rand(gaps.shape) < 0.5
    assert torch.equal(layer(x, gaps, routing=Routing(skips=skips)).trace.scored, ~skips & reads)
    assert count.called == reads
