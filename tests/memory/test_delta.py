"""The delta working memory: steps equal one pass, padding changes nothing, wherever it stands, and gaps fade."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cramlab.config import from_dict, to_dict
from cramlab.memory import CRAMConfig, EpisodicMemoryConfig, RouterConfig
from cramlab.memory.decode import Decoder
from cramlab.memory.delta import DeltaMemory, DeltaMemoryConfig

D = 12


def memory(conv_tokens=4, dtype=torch.float64):
    torch.manual_seed(0)
    return DeltaMemory(DeltaMemoryConfig(n_heads=2, d_head=8, conv_tokens=conv_tokens), D).to(dtype)


def tokens(n_batch=3, n_tokens=21, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_batch, n_tokens, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(n_batch, n_tokens, generator=generator, dtype=torch.float64).to(dtype) * 3


@pytest.mark.parametrize("conv_tokens", [1, 2, 4])
def test_steps_and_pieces_equal_one_pass(conv_tokens):
    layer, (x, gaps) = memory(conv_tokens), tokens()
    whole = layer(x, gaps, layer.initial_state(3))
    for sizes in ([1] * 21, [5, 1, 15]):
        state, parts = layer.initial_state(3), []
        for some, those in zip(x.split(sizes, dim=1), gaps.split(sizes, dim=1), strict=True):
            y, _, state = layer(some, those, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole[0])
        torch.testing.assert_close(state, whole[2])


@pytest.mark.parametrize("where", ["left", "right", "between"])
def test_padding_changes_nothing_wherever_it_stands(where):
    layer, (x, gaps) = memory(), tokens(n_batch=1)
    n_tokens = 21
    valid = torch.ones(1, n_tokens + 9, dtype=torch.bool)
    places = {"left": range(9), "right": range(n_tokens, n_tokens + 9), "between": [0, 3, 4, 9, 10, 11, 20, 28, 29]}
    valid[0, list(places[where])] = False
    padded, held = torch.full((1, n_tokens + 9, D), 7.0, dtype=x.dtype), torch.ones(1, n_tokens + 9, dtype=x.dtype)
    padded[valid], held[valid] = x[0], gaps[0]
    y, _, state = layer(padded, held, layer.initial_state(1), valid)
    alone = layer(x, gaps, layer.initial_state(1))
    torch.testing.assert_close(y[valid], alone[0][0])
    torch.testing.assert_close(state, alone[2])
    further = layer(x, gaps, state)[0]
    torch.testing.assert_close(further, layer(x, gaps, alone[2])[0])


def test_a_long_gap_leaves_nothing_but_the_convolution():
    layer, (x, gaps) = memory(conv_tokens=1), tokens(n_batch=1)
    gaps[:, 10] = 1e6
    whole = layer(x, gaps, layer.initial_state(1))[0]
    torch.testing.assert_close(whole[:, 10:], layer(x[:, 10:], gaps[:, 10:], layer.initial_state(1))[0])


def test_everything_learns():
    layer, (x, gaps) = memory(), tokens()
    y, h, state = layer(x, gaps, layer.initial_state(3))
    (y.square().sum() + h.sum() + state.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_in_16_bits_the_state_keeps_32():
    layer, (x, gaps) = memory(dtype=torch.bfloat16), tokens(dtype=torch.bfloat16)
    y, _, state = layer(x, gaps, layer.initial_state(3))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert y.isfinite().all()


def test_under_autocast_a_step_keeps_the_state_in_32_bits_and_equals_one_pass():
    layer, (x, gaps) = memory(dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole, _, last = layer(x, gaps, layer.initial_state(3))
        state, steps = layer.initial_state(3), []
        for some, those in zip(x.split(1, dim=1), gaps.split(1, dim=1), strict=True):
            y, _, state = layer(some, those, state)
            steps.append(y)
    assert state.dtype == last.dtype == torch.float32
    torch.testing.assert_close(state, last, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=2e-2, atol=2e-2)


def layer(router="benefit", write="all"):
    torch.manual_seed(0)
    config = CRAMConfig(
        working=DeltaMemoryConfig(n_heads=2, d_head=4),
        episodic=EpisodicMemoryConfig(n_heads=2, capacity=7, write=write),
        router=RouterConfig(name=router),
    )
    return config.build(D).double().eval()


@pytest.mark.parametrize("router", ["benefit", "gumbel", "always", "never"])
@pytest.mark.parametrize("write", ["all", "salience"])
def test_a_layer_steps_as_it_passes(router, write):
    made, (x, gaps) = layer(router, write), tokens()
    with torch.no_grad():
        whole = made(x, gaps)
        state, ys = None, []
        for t in range(x.shape[1]):
            output = made(x[:, t : t + 1], gaps[:, t : t + 1], state)
            state = output.state
            ys.append(output.y)
        torch.testing.assert_close(torch.cat(ys, dim=1), whole.y)
        if router != "gumbel":
            decoder = Decoder(made, made(x[:, :9], gaps[:, :9]).state)
            steps = [decoder.step(x[:, t], gaps[:, t]) for t in range(9, x.shape[1])]
            torch.testing.assert_close(torch.stack(steps, dim=1), whole.y[:, 9:])


def test_padding_of_a_layer_never_leaks():
    made, (x, gaps) = layer(), tokens(n_batch=2)
    valid = torch.rand(2, 21, generator=torch.Generator().manual_seed(2)) > 0.4
    with torch.no_grad():
        padded = made(torch.where(valid[..., None], x, 99.0), gaps.where(valid, 5.0), valid=valid)
        further = made(x, gaps, padded.state).y
        for b in range(2):
            alone = made(x[b : b + 1, valid[b]], gaps[b : b + 1, valid[b]])
            torch.testing.assert_close(padded.y[b, valid[b]], alone.y[0])
            torch.testing.assert_close(further[b], made(x[b : b + 1], gaps[b : b + 1], alone.state).y[0])


@pytest.mark.parametrize(("conv_tokens", "training"), [(1, False), (4, False), (1, True)])
def test_its_products_are_stated_as_they_are_counted(conv_tokens, training):
    """In training the counter takes the backward pass of a depthwise convolution for a dense one, so it is left out."""
    made, x = memory(conv_tokens, torch.float32), torch.randn(2, 128, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _, _ = made(x, torch.rand(2, 128), made.initial_state(2))
        if training:
            y.sum().backward()
    stated = 2 * 128 * made.product_flops(D, 3 if training else 1, 1)
    if training:  # the gradient of the triangular solution is one product more
        stated += 2 * 128 * 2 * 2 * 64 * (8 + 8)
    assert stated == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_record_holds_which_memory_it_is():
    config = CRAMConfig(working=DeltaMemoryConfig(n_heads=2))
    assert from_dict(to_dict(config), CRAMConfig(working=DeltaMemoryConfig())) == config
