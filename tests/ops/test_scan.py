"""The recurrence, in chunks of tokens on a CPU, equals its reference implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cramlab.ops.scan import naive
from cramlab.ops.scan.decay import decay_scan

RATES = torch.tensor([1.0, 0.1, 0.001])


def example(n_tokens, n_batch=2, dtype=torch.float64):
    u = torch.randn(n_batch, n_tokens, 3, 4, dtype=dtype, requires_grad=True)
    gaps = torch.rand(n_batch, n_tokens, dtype=dtype) * 3
    state = torch.randn(n_batch, 3, 4, dtype=dtype, requires_grad=True)
    return u, gaps, state


@pytest.mark.parametrize("n_tokens", [1, 2, 31, 32, 33, 100, 1100])
def test_scan_equals_its_twin_with_gradients(n_tokens):
    u, gaps, state = example(n_tokens)
    rates = RATES.double().requires_grad_()
    leaves = (u, state, rates, gaps.requires_grad_())
    fast, fast_end = decay_scan(u, gaps, rates, state)
    slow = naive.decay_scan(u, gaps, rates, state)
    assert torch.allclose(fast, slow, atol=1e-10)
    assert torch.equal(fast_end, fast[:, -1])
    weight = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * weight).sum() + fast_end.sum(), leaves),
        torch.autograd.grad((slow * weight).sum() + slow[:, -1].sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-9)


def test_the_chunk_size_changes_nothing():
    u, gaps, state = example(100)
    whole, _ = decay_scan(u, gaps, RATES.double(), state, chunk=100)
    for chunk in (2, 7, 64):
        found, _ = decay_scan(u, gaps, RATES.double(), state, chunk=chunk)
        assert torch.allclose(found, whole, atol=1e-10)


def test_half_precision_is_solved_in_single():
    u, gaps, state = (t.detach().bfloat16() for t in example(300))
    rates = (RATES / 100).bfloat16()
    found, end = decay_scan(u, gaps, rates, state)
    exact = naive.decay_scan(*(t.double() for t in (u, gaps, rates, state)))
    assert (found.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-3)
    assert torch.allclose(end.double(), exact[:, -1], rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_gaps_add_up(first, second):
    """Two silent steps are one step of the summed gap."""
    state = torch.ones(1, 3, 4, dtype=torch.float64)
    silence = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    rates = RATES.double()
    _, two = decay_scan(silence, torch.tensor([[first, second]], dtype=torch.float64), rates, state)
    _, one = decay_scan(silence[:, :1], torch.tensor([[first + second]], dtype=torch.float64), rates, state)
    assert torch.allclose(two, one, rtol=1e-9, atol=1e-300)


def test_zero_gaps_only_add_and_huge_gaps_forget():
    u = torch.ones(1, 4, 3, 4)
    state = torch.ones(1, 3, 4)
    s, _ = decay_scan(u, torch.zeros(1, 4), RATES, state)
    assert torch.equal(s[0, :, 0, 0], torch.tensor([2.0, 3.0, 4.0, 5.0]))
    rates = RATES.clone().requires_grad_()
    s, end = decay_scan(u, torch.tensor([[0.0, 1e12, 0.0, 1e30]]), rates, state)
    assert torch.equal(s[0, :, 2, 0], torch.tensor([2.0, 1.0, 2.0, 1.0]))
    end.sum().backward()
    assert torch.isfinite(rates.grad).all()


def test_a_small_gap_survives_after_a_huge_one():
    """Absolute times would have rounded it away."""
    u = torch.zeros(1, 3, 1, 1)
    u[0, 1] = 1.0
    gaps, rates, state = torch.tensor([[0.0, 1e9, 0.5]]), torch.tensor([1.0]), torch.zeros(1, 1, 1)
    s, _ = decay_scan(u, gaps, rates, state)
    assert s[0, 2].item() == pytest.approx(torch.tensor(-0.5).exp().item(), rel=1e-6)


def test_a_state_in_16_bits_is_not_rounded_at_every_token():
    u, gaps, rates = torch.randn(1, 2000, 2, 4, dtype=torch.bfloat16), torch.ones(1, 2000), torch.tensor([1e-3, 1.0])
    exact, _ = decay_scan(u.double(), gaps, rates, torch.zeros(1, 2, 4, dtype=torch.float64))
    state = torch.zeros(1, 2, 4)
    for t in range(2000):
        s, state = decay_scan(u[:, t : t + 1], gaps[:, t : t + 1], rates, state)
        assert s.dtype == torch.bfloat16
    assert torch.allclose(state.double(), exact[:, -1], atol=1e-3)
