"""The attention kernels equal the reference implementation, with gradients. On a CPU only in Triton's interpreter."""

import kernels
import pytest
import torch
from kernels import DEVICE

from cramlab.ops.read import fused as fused_read
from cramlab.ops.read import naive

pytestmark = [kernels.wanted, kernels.protest]


def twin(q, last, keys, values, *others):
    """The reference implementation in double precision."""
    return naive.attend(q.double(), last, keys.double(), values.double(), *others)


def example(n_readers, n_places, width, n_heads=2, dtype=torch.float32):
    d = n_heads * width
    q, keys, values = (
        torch.randn(len(n_readers), n, d, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (max(n_readers), n_places, n_places)
    )
    last = torch.randint(n_places, (len(n_readers), max(n_readers)), device=DEVICE).sort(dim=1).values
    for row, n in zip(last, n_readers, strict=True):
        row[n:] = -1
    return q, last, keys, values


@pytest.mark.parametrize("n_readers", [(20, 3, 0), (1,), (33,)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [None, 40])
def test_kernel_equals_twin(n_readers, masked, capacity, monkeypatch):
    """With one split and several; few, no and many readers; empty places; a capacity."""
    monkeypatch.setattr(fused_read, "_LEAST_SPLIT", 64)
    if n_readers == (33,):  # as if there were enough readers for large blocks
        monkeypatch.setattr(fused_read, "_MANY_ROWS", 1)
        monkeypatch.setattr(fused_read, "_AT_ONCE", 1)
    n_places = 150
    for width in (32, 64, 128) if not masked and capacity is None else (16,):
        q, last, keys, values = example(n_readers, n_places, width)
        filled = torch.rand(len(n_readers), n_places, device=DEVICE) < 0.6 if masked else None
        given = (q, last, keys, values, filled, 2, capacity)
        fast, slow = fused_read.attend(*given), twin(*given)
        assert torch.allclose(fast.double(), slow, atol=1e-5)
        weight = torch.randn_like(q)
        inputs = (q, keys, values)
        grads = (torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (fast, slow))
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, atol=2e-5)


def test_nobody_reads_and_nothing_is_held():
    for n_readers, n_places in ((0, 5), (3, 0)):
        q, keys = (torch.randn(2, n, 32, device=DEVICE, requires_grad=True) for n in (n_readers, n_places))
        last = torch.full((2, n_readers), -1, device=DEVICE)
        y = fused_read.attend(q, last, keys, keys, None, 2, None)
        assert y.shape == q.shape
        assert not y.any()
        y.sum().backward()
        assert not q.grad.any()
        assert not keys.grad.any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [None, 40])
def test_use_equals_twin(masked, capacity, monkeypatch):
    """With empty places, with a capacity, and without the readers' own entries."""
    monkeypatch.setattr(fused_read, "_LEAST_SPLIT", 64)
    n_heads, n_places = 2, 150
    q, last, keys, _ = example((20, 3, 0), n_places, 32)
    filled = torch.rand(3, n_places, device=DEVICE) < 0.6 if masked else None
    own = torch.where(torch.rand(last.shape, device=DEVICE) < 0.5, last, -1)
    found = fused_read.use(q, last, own, keys, filled, n_heads, capacity)
    expected = naive.use(q.double(), last, own, keys.double(), filled, n_heads, capacity)
    assert torch.allclose(found.double(), expected, atol=1e-5)
