import pytest
import torch
from torch.nn import functional as F

from cramlab.memory import AdapterConfig, CRAMConfig, EpisodicMemoryConfig, RouterConfig, WorkingMemoryConfig
from cramlab.memory import decode as module
from cramlab.memory.decode import Decoder, GraphDecoder

D = 16


def make(router="benefit", capacity=None, write="all", learns="decision"):
    config = CRAMConfig(
        working=WorkingMemoryConfig(d_state=8, n_timescales=4),
        episodic=EpisodicMemoryConfig(n_heads=2, capacity=capacity, write=write),
        semantic=AdapterConfig(rank=12),
        router=RouterConfig(name=router, d_hidden=10, learns=learns),
    )
    layer = config.build(D).eval()
    for gate in (getattr(layer, "gate", None), layer.episodic.salience):
        if gate is not None:  # some tokens pass, others do not
            torch.nn.init.normal_(gate.out.weight)
            torch.nn.init.zeros_(gate.out.bias)
    return layer


@pytest.mark.parametrize("router", ["benefit", "always", "never"])
@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("n_before", [0, 3, 20])
def test_steps_in_place_equal_one_pass(router, capacity, write, n_before, monkeypatch):
    monkeypatch.setattr(module, "_GROWTH", 4)
    layer = make(router, capacity, write)
    x, gaps = torch.randn(3, 40, D), torch.rand(3, 40)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, : n_before // 2] = False  # padded on the left, so that rows hold different numbers of entries
    with torch.no_grad():
        whole = layer(x, gaps, valid=valid)
        decoder = Decoder(layer, layer(x[:, :n_before], gaps[:, :n_before], valid=valid[:, :n_before]).state)
        steps = [decoder.step(x[:, t], gaps[:, t]) for t in range(n_before, 40)]
    assert torch.allclose(torch.stack(steps, dim=1), whole.y[:, n_before:], atol=1e-5)
    state = decoder.state()
    assert torch.allclose(state.working, whole.state.working, atol=1e-5)
    filled = whole.state.buffer.filled
    assert torch.equal(state.buffer.filled, filled)
    for name in ("keys", "values", "times"):
        ours, theirs = getattr(state.buffer, name), getattr(whole.state.buffer, name)
        assert torch.allclose(ours[filled], theirs[filled], atol=1e-4)


@pytest.mark.parametrize("router", ["benefit", "always", "never"])
@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("n_before", [0, 3, 20])
def test_steps_that_decide_on_the_device_equal_one_pass(router, write, n_before):
    layer = make(router, 5, write)
    x, gaps = torch.randn(3, 40, D), torch.rand(3, 40)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, : n_before // 2] = False
    with torch.no_grad():
        whole = layer(x, gaps, valid=valid)
        decoder = GraphDecoder(layer, layer(x[:, :n_before], gaps[:, :n_before], valid=valid[:, :n_before]).state)
        parts = [decoder.working, decoder.keys, decoder.values, decoder.n_written]
        places = [part.data_ptr() for part in parts]
        steps = [decoder.step(x[:, t], gaps[:, t]) for t in range(n_before, 40)]
    assert torch.allclose(torch.stack(steps, dim=1), whole.y[:, n_before:], atol=1e-5)
    parts = [decoder.working, decoder.keys, decoder.values, decoder.n_written]
    assert [part.data_ptr() for part in parts] == places  # a recorded step goes on with the same memory


@pytest.mark.parametrize("learns", ["nats", "soft", "straight"])
@pytest.mark.parametrize("kind", [Decoder, GraphDecoder])
def test_steps_weigh_reads_as_one_pass_does(kind, learns):
    layer = make(capacity=5, learns=learns)
    x, gaps = torch.randn(3, 30, D), torch.rand(3, 30)
    with torch.no_grad():
        layer.gate.threshold.fill_(0.1)
        whole = layer(x, gaps)
        decoder = kind(layer, layer(x[:, :3], gaps[:, :3]).state)
        steps = [decoder.step(x[:, t], gaps[:, t]) for t in range(3, 30)]
    assert 0 < whole.trace.attended.float().mean() < 1
    assert torch.allclose(torch.stack(steps, dim=1), whole.y[:, 3:], atol=1e-5)


def test_a_step_to_be_recorded_needs_a_bound():
    layer = make()
    with pytest.raises(ValueError, match=r"episodic.capacity = None"):
        GraphDecoder(layer, layer(torch.randn(1, 2, D), torch.ones(1, 2)).state)


@pytest.mark.parametrize("router", ["benefit", "always", "never"])
@pytest.mark.parametrize("write", ["all", "salience"])
def test_only_readers_are_scored_and_only_what_is_written_has_keys(router, write, monkeypatch):
    layer = make(router, write=write)
    x, gaps = torch.randn(3, 40, D), torch.rand(3, 40)
    trace = layer(x, gaps).trace
    n_scored, fused, n_keys = [], F.scaled_dot_product_attention, []

    def counting(q, *args, **kwargs):
        n_scored.append(q.shape[0] * q.shape[2])
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    decoder = Decoder(layer, layer(x[:, :0], gaps[:, :0]).state)
    layer.episodic.w_key.register_forward_hook(lambda _module, _args, keys: n_keys.append(len(keys)))
    for t in range(40):
        decoder.step(x[:, t], gaps[:, t])
    assert sum(n_scored) == int(trace.scored.sum())
    assert sum(n_keys) == (trace.scored.numel() if trace.written is None else int(trace.written.sum()))


def test_its_bytes_stop_growing_at_the_capacity(monkeypatch):
    monkeypatch.setattr(module, "_GROWTH", 4)
    decoder = Decoder(layer := make("never", capacity=10), layer(torch.randn(2, 1, D), torch.ones(2, 1)).state)
    sizes = []
    for _ in range(30):
        decoder.step(torch.randn(2, D), torch.ones(2))
        sizes.append(decoder.n_bytes)
    places = [4] * 3 + [8] * 4 + [10] * 23
    assert sizes == [2 * (n * (2 * D + 1) + 1 + 8) * 4 for n in places]


def test_what_it_took_over_from_stays_as_it_was():
    layer = make(capacity=5)
    state = layer(torch.randn(2, 9, D), torch.rand(2, 9)).state
    before = [t.clone() for t in (state.working, *state.buffer)]
    decoder = Decoder(layer, state)
    for _ in range(7):
        decoder.step(torch.randn(2, D), torch.rand(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (state.working, *state.buffer), strict=True))


def test_routers_that_need_more_than_the_token_are_refused():
    layer = make("gumbel")
    with pytest.raises(ValueError, match='router "gumbel"'):
        Decoder(layer, layer(torch.randn(1, 2, D), torch.ones(1, 2)).state)
