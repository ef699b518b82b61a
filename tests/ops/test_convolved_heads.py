"""The short convolution with its kernels equals a loop over tokens, outputs and gradients.

On a CPU the kernels run in Triton's interpreter.
"""

import math

import kernels
import pytest
import torch
from kernels import DEVICE
from torch.nn import functional as F

from cramlab.ops import dispatch
from cramlab.ops.conv import fused, naive
from cramlab.ops.conv.heads import convolved_heads

SIZES = [(1, 1, 1, 8, 4), (2, 70, 3, 20, 4), (1, 33, 2, 64, 1), (2, 2, 1, 16, 5), (1, 40, 1, 5, 3)]  # B, T, H, E, n
with_kernels = pytest.mark.usefixtures("_with_kernels")


@pytest.fixture
def _with_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "usable", lambda _: True)


def inputs(n_batch, n_tokens, n_heads, channels, n_taps, dtype=torch.float64):
    width = 3 * n_heads * channels
    shapes = ((n_batch, n_tokens, width), (width, n_taps), (n_batch, n_taps - 1, width))
    return [torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]


def by_tokens(x, taps, before, n_heads):
    """The definition, one token at a time."""
    history, made = torch.cat([before, x], dim=1), []
    for t in range(x.shape[1]):
        window = history[:, t : t + taps.shape[1]]
        z = F.silu(torch.einsum("bnc,cn->bc", window, taps)).view(len(x), 3, n_heads, -1)
        q, k, v = z.unbind(1)
        made.append((F.normalize(q, dim=-1) / math.sqrt(q.shape[-1]), F.normalize(k, dim=-1), v))
    return [torch.stack(part, dim=1) for part in zip(*made, strict=True)]


def compare(found, wanted, given, exact, limit):
    """Outputs and gradients are equal to `limit` of the largest number."""
    weights = [torch.randn_like(y) for y in found]
    grads = [
        torch.autograd.grad(
            ys, leaves, [w.to(y.dtype) for y, w in zip(ys, weights, strict=True)], materialize_grads=True
        )
        for ys, leaves in ((found, given), (wanted, exact))
    ]
    for fast, slow in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
        assert fast.shape == slow.shape
        if slow.numel():
            torch.testing.assert_close(
                fast.double(), slow.double(), rtol=limit, atol=limit * float(slow.detach().abs().max())
            )


@pytest.mark.parametrize("sizes", SIZES)
def test_the_reference_equals_its_definition(sizes):
    given = inputs(*sizes)
    found, wanted = naive.convolved_heads(*given, sizes[2]), by_tokens(*given, sizes[2])
    compare(found, wanted, given, given, 1e-12)


@kernels.wanted
@kernels.protest
@with_kernels
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_the_kernels_equal_the_definition(sizes, dtype, limit):
    given = inputs(*sizes, dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    found = convolved_heads(*given, sizes[2])
    assert [t.dtype for t in found] == [dtype] * 3
    compare(found, by_tokens(*exact, sizes[2]), given, exact, limit)


@kernels.wanted
@kernels.protest
@with_kernels
def test_two_calls_equal_one():
    x, taps, before = (t.detach() for t in inputs(2, 50, 2, 8, 4, torch.float32))
    whole = convolved_heads(x, taps, before, 2)
    first, second = convolved_heads(x[:, :20], taps, before, 2), convolved_heads(x[:, 20:], taps, x[:, 17:20], 2)
    for both, one, two in zip(whole, first, second, strict=True):
        assert torch.equal(both, torch.cat([one, two], dim=1))


@kernels.wanted
@kernels.protest
@with_kernels
def test_a_row_of_zeros_has_a_gradient_of_its_own():
    """Lengths below the least that is divided by are no longer lengths."""
    given = [torch.zeros_like(t).requires_grad_() for t in inputs(1, 5, 1, 8, 4, torch.float32)]
    with torch.no_grad():
        given[1].fill_(1.0)
    exact = [t.detach().double().requires_grad_() for t in given]
    compare(convolved_heads(*given, 1), by_tokens(*exact, 1), given, exact, 1e-5)


@kernels.wanted
@kernels.protest
@with_kernels
def test_nothing_to_convolve():
    given = [t.detach().requires_grad_() for t in inputs(0, 5, 1, 8, 4, torch.float32)]
    found = convolved_heads(*given, 1)
    assert [t.shape for t in found] == [(0, 5, 1, 8)] * 3
    taps = torch.autograd.grad(sum(t.sum() for t in found), given[1])[0]
    assert torch.equal(taps, torch.zeros_like(taps))


@kernels.wanted
@kernels.protest
def test_the_operators_are_registered_as_pytorch_requires():
    given = inputs(1, 5, 2, 8, 4, torch.float32)
    torch.library.opcheck(fused._convolved_heads, (*given, 2))
    given = [t.detach() for t in given]
    torch.library.opcheck(fused._convolved_heads_backward, (*fused._convolved_heads(*given, 2), *given))


def test_what_does_not_fit_a_program_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "usable", lambda _: True)

    def usable(channels, n_taps, dtype=torch.float32):
        width = 3 * 2 * channels
        return fused.usable(
            torch.zeros(1, 2, width, dtype=dtype), torch.zeros(width, n_taps), torch.zeros(1, n_taps - 1, width), 2
        )

    assert usable(256, 8)
    assert not usable(257, 8)
    assert not usable(64, 9)
    assert not usable(64, 4, torch.float64)
