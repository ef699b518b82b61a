"""Rotary positions and norms of queries and keys: reference implementation, steps, decoders, padding, bounds."""

import pytest
import torch

from cramlab.memory import AdapterConfig, CRAMConfig, EpisodicMemoryConfig, RouterConfig, WorkingMemoryConfig
from cramlab.memory import decode as module
from cramlab.memory.decode import Decoder, GraphDecoder
from cramlab.memory.matching import Matching
from cramlab.memory.reference import reference_layer
from cramlab.mixer import Bounds, Routing

D = 16
OPTIONS = {"rope": {"rope": True, "rope_theta": 50.0}, "qk_norm": {"qk_norm": True}}
OPTIONS["both"] = OPTIONS["rope"] | OPTIONS["qk_norm"]
of_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
of_writes = pytest.mark.parametrize("write", ["all", "salience"])
of_capacity = pytest.mark.parametrize("capacity", [None, 5])


def make(options, router="benefit", *, capacity=None, write="all"):
    config = CRAMConfig(
        working=WorkingMemoryConfig(d_state=8, n_timescales=4),
        episodic=EpisodicMemoryConfig(n_heads=2, capacity=capacity, write=write, **options),
        semantic=AdapterConfig(rank=12),
        router=RouterConfig(name=router, d_hidden=10),
    )
    layer = config.build(D).eval()
    with torch.no_grad():
        for scale in layer.episodic.matching.parameters():
            scale.uniform_(0.5, 2)
        for gate in (getattr(layer, "gate", None), layer.episodic.salience):
            if gate is not None:  # some tokens pass, others do not
                gate.out.weight.normal_()
                gate.out.bias.zero_()
    return layer


def example(n_tokens, n_batch=3):
    return torch.randn(n_batch, n_tokens, D), torch.rand(n_batch, n_tokens) * 2


@of_options
@of_writes
@of_capacity
@pytest.mark.parametrize("router", ["benefit", "gumbel", "always"])
def test_layer_and_gradients_equal_the_reference_implementation(options, write, capacity, router):
    layer, (x, gaps) = make(options, router, capacity=capacity, write=write), example(33, 2)
    x.requires_grad_()
    valid = torch.ones(2, 33, dtype=torch.bool)
    valid[0, :3] = valid[0, 20:26] = valid[1, -4:] = False
    weight, parameters = torch.randn(2, 33, D), [x, *layer.parameters()]
    output = layer(x, gaps, valid=valid)
    y, reads = reference_layer(layer, x, gaps, valid=valid)
    assert torch.allclose(output.y, y, atol=1e-5)
    assert torch.equal(output.trace.attended, reads)
    assert router == "gumbel" or reads.any()
    fast, slow = (torch.autograd.grad((t * weight).sum(), parameters, allow_unused=True) for t in (output.y, y))
    for a, b in zip(fast, slow, strict=True):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-3)


@of_options
@of_writes
@of_capacity
def test_chunks_and_both_decoders_equal_one_pass(options, write, capacity, monkeypatch):
    monkeypatch.setattr(module, "_GROWTH", 4)
    layer, (x, gaps) = make(options, capacity=capacity, write=write), example(40)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, :7] = False  # rows hold different numbers of entries
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
            assert torch.equal(state.buffer.n_written, whole.state.buffer.n_written)
        before = layer(x[:, :20], gaps[:, :20], valid=valid[:, :20]).state  # with a capacity, it has evicted
        for kind in (Decoder, GraphDecoder) if capacity else (Decoder,):
            decoder = kind(layer, before)
            steps = torch.stack([decoder.step(x[:, t], gaps[:, t]) for t in range(20, 40)], dim=1)
            assert torch.allclose(steps, whole.y[:, 20:], atol=1e-5)
        decoder = Decoder(layer, before)
        for t in range(20, 30):
            decoder.step(x[:, t], gaps[:, t])
        rest = layer(x[:, 30:], gaps[:, 30:], decoder.state())  # back from a decoder to whole passes
        assert torch.allclose(rest.y, whole.y[:, 30:], atol=1e-5)
        assert torch.equal(rest.state.buffer.n_written, whole.state.buffer.n_written)


@of_writes
@pytest.mark.parametrize("training", [False, True])
def test_with_bounds_it_is_the_same_layer(write, training):
    layer, (x, gaps) = make(OPTIONS["both"], write=write), example(40)
    object.__setattr__(layer.config.episodic, "write_audit_frac", 0.0)
    layer.train(training)
    plain = layer(x, gaps)
    bounded = layer(x, gaps, routing=Routing(bounds=Bounds(40, 40)))
    assert torch.allclose(bounded.y, plain.y, atol=1e-5)
    for name, loss in plain.aux.items():
        assert torch.allclose(bounded.aux[name], loss, atol=1e-5)
    assert torch.equal(bounded.state.buffer.n_written, plain.state.buffer.n_written)
    few = layer(x, gaps, routing=Routing(bounds=Bounds(40, 3)))
    if write == "salience":
        assert int(few.state.buffer.n_written.max()) == 3


def test_scores_depend_on_the_distance_and_on_nothing_else():
    matching = Matching(2, 8, norm=False, theta=100.0).double()
    q, k = torch.randn(2, D, dtype=torch.float64)

    def score(i, j):
        return (matching.query(q, torch.tensor(i)) * matching.key(k, torch.tensor(j))).sum()

    assert torch.allclose(score(5, 3), score(1005, 1003))
    assert torch.allclose(score(0, 0), q @ k)
    assert not torch.allclose(score(5, 3), score(5, 4))


def test_neither_time_gaps_nor_padding_count_as_positions():
    """The same entries, with other gaps and padding between them, are at the same positions."""
    layer = make(OPTIONS["rope"], "always")
    h, valid = torch.randn(1, 9, D), torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1]]).bool()
    memory = layer.episodic
    written = memory.write(h, torch.rand(1, 9), memory.initial_buffer(1), valid)
    assert written.position[valid].tolist() == [0, 1, 2, 3, 4]
    assert written.buffer.n_written.tolist() == [5]
    alone = memory.write(h[:, valid[0]], torch.ones(1, 5), memory.initial_buffer(1), None)
    assert torch.allclose(written.buffer.keys[valid], alone.buffer.keys[0])


def test_a_token_that_is_not_written_stands_after_those_that_are():
    layer = make(OPTIONS["rope"], write="salience")
    writes = torch.tensor([[False, True, False, False, True, True, False]])
    memory = layer.episodic
    written = memory.write(torch.randn(1, 7, D), torch.ones(1, 7), memory.initial_buffer(1), writes)
    assert written.position.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    bounded = memory.write(torch.randn(1, 7, D), torch.ones(1, 7), memory.initial_buffer(1), writes, most=2)
    assert bounded.position.tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert bounded.buffer.n_written.tolist() == [2]


def test_without_options_there_are_no_parameters_and_nothing_changes():
    layer, plain = make({"qk_norm": True}), make({})
    assert not [name for name in plain.state_dict() if "matching" in name]
    x = torch.randn(2, 5, D)
    assert plain.episodic.matching.key(x, None) is x
    with torch.no_grad():
        layer.episodic.matching.key_scale.fill_(1)
    heads = layer.episodic.matching.key(x, None).unflatten(-1, (2, -1))
    assert torch.allclose(heads.square().mean(-1), torch.ones(()), atol=1e-4)


def test_heads_of_an_odd_width_cannot_turn():
    with pytest.raises(ValueError, match=r"episodic.rope = True needs heads of an even width"):
        CRAMConfig(episodic=EpisodicMemoryConfig(n_heads=2, rope=True)).build(14)
