"""The delta working memory: steps equal one pass, padding changes nothing, wherever it stands, and gaps fade."""

import pytest
import torch

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
