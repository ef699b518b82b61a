"""The scan kernels equal the reference implementation, with gradients. On a CPU only in Triton's interpreter."""

import kernels
import pytest
import torch
from kernels import DEVICE

from cramlab.ops.scan import fused as fused_scan
from cramlab.ops.scan import naive

pytestmark = [kernels.wanted, kernels.protest]


def example(n_tokens, n_rates=3, width=4):
    u = torch.randn(2, n_tokens, n_rates, width, device=DEVICE, requires_grad=True)
    gaps = (torch.rand(2, n_tokens, device=DEVICE) * 3).requires_grad_()
    rates = torch.logspace(0, -3, n_rates, device=DEVICE).requires_grad_()
    state = torch.randn(2, n_rates, width, device=DEVICE, requires_grad=True)
    return u, gaps, rates, state


def twin(*given):
    """The reference implementation in double precision."""
    return naive.decay_scan(*(t.double() for t in given))


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("channels", [(3, 4), (2, 5)])
def test_kernel_equals_twin_with_gradients(n_tokens, channels, monkeypatch):
    """With several chunks of chunks and several blocks of channels."""
    monkeypatch.setattr(fused_scan, "_CHUNK", 8)
    monkeypatch.setattr(fused_scan, "_MOST_CHANNELS", 8)
    given = example(n_tokens, *channels)
    fast, slow = fused_scan.decay_scan(*given), twin(*given)
    assert torch.allclose(fast.double(), slow, atol=1e-5)
    weight = torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad((s * weight).sum(), given) for s in (fast, slow)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_small_gaps_survive_after_a_huge_one(monkeypatch):
    monkeypatch.setattr(fused_scan, "_CHUNK", 8)
    u, gaps, rates, state = example(40)
    with torch.no_grad():
        gaps[:, 17] = 1e30
    fast, slow = fused_scan.decay_scan(u, gaps, rates, state), twin(u, gaps, rates, state)
    assert torch.allclose(fast.double(), slow, atol=1e-5)
    grads = (torch.autograd.grad(s[:, 18:].sum(), [u, rates]) for s in (fast, slow))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_half_precision_is_solved_in_single():
    u, *others = example(100)
    given = (u.detach().bfloat16().requires_grad_(), *others)
    found, exact = fused_scan.decay_scan(*given), twin(*given)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, atol=1e-4)
    of_u, *of_others = torch.autograd.grad(found.sum(), given)
    expected, *rest = torch.autograd.grad(exact.sum(), given)
    assert of_u.dtype == torch.bfloat16
    assert torch.allclose(of_u, expected, rtol=2**-7)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(of_others, rest, strict=True))
