"""The selection kernels equal their reference implementations. On a CPU only in Triton's interpreter."""

import kernels
import pytest
import torch
from kernels import DEVICE

from cramlab.ops import dispatch
from cramlab.ops.select import fused, naive
from cramlab.ops.select import tokens as selection


def chosen_tokens(n_batch=3, n_tokens=50):
    chosen = torch.rand(n_batch, n_tokens) < 0.3
    chosen[-1] = False
    return chosen.to(DEVICE)


def test_first_tokens_in_order():
    token, there, rank = selection.first_tokens(torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool(), 2)
    assert rank.tolist() == [[0, 1, 1, 2, 3], [1, 1, 1, 1, 1]]
    assert token[0].tolist() == [1, 3]
    assert (token[1, 0], there.tolist()) == (0, [[True, True], [True, False]])


def test_entries_are_taken_and_put_back():
    h = torch.arange(12.0).view(2, 3, 2)
    chosen = selection.first_tokens(torch.tensor([[1, 0, 1], [0, 1, 0]]).bool(), 2)
    assert selection.take(h[..., 0], chosen, -1).tolist() == [[0, 4], [8, -1]]
    taken = selection.take(h, chosen)
    assert torch.equal(taken, torch.stack([h[0, [0, 2]], torch.stack([h[1, 1], torch.zeros(2)])]))
    is_chosen = torch.tensor([[True, False, True], [False, True, False]])[..., None]
    assert torch.equal(selection.put_onto(taken, chosen, -h), torch.where(is_chosen, h, -h))
    assert selection.put_onto(taken.bfloat16(), chosen, -h).dtype == h.dtype
    assert selection.take(h[..., 0] > 4, chosen).tolist() == [[False, False], [True, False]]


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize("most", [0, 1, 4, 40, 70])
@pytest.mark.parametrize("n_tokens", [50, 64, 7, 0])
def test_kernel_finds_the_same_tokens(most, n_tokens, monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 16)
    chosen = chosen_tokens(n_tokens=n_tokens)
    with_kernel = fused.first_tokens(chosen, most)
    without = naive.first_tokens(chosen.cpu(), most)
    for fast, slow in zip(with_kernel, without, strict=True):
        assert torch.equal(fast.cpu(), slow)


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize("shape", [(), (1,), (5,), (300,)])
@pytest.mark.parametrize("most", [0, 4, 21])
def test_kernels_take_and_put_the_same(shape, most, monkeypatch):
    """Outputs and gradients; sequences with more than `most` chosen tokens, with fewer and with none."""
    monkeypatch.setattr(fused, "_BLOCK", 64)
    is_chosen = chosen_tokens()
    chosen = selection.first_tokens(is_chosen, most)
    h, onto = (torch.randn(*is_chosen.shape, *shape, device=DEVICE, requires_grad=True) for _ in range(2))
    found = torch.randn(len(h), most, *shape, device=DEVICE, requires_grad=True)
    weights = torch.randn_like(found), *torch.randn(2, *h.shape, device=DEVICE)
    results = []
    for with_kernels in (True, False):
        monkeypatch.setattr(dispatch, "usable", lambda _, on=with_kernels: on)
        outputs = (
            selection.take(h, chosen, 7),
            selection.put_onto(found, chosen, torch.zeros_like(onto)),
            selection.put_onto(found, chosen, onto),
        )
        total = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, [h, found, onto])])
    for fast, slow in zip(*results, strict=True):
        assert torch.allclose(fast, slow, atol=1e-6)


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize(("n_batch", "n_tokens", "most"), [(1, 1, 1), (1, 40, 9), (3, 40, 9)])
def test_kernels_read_what_is_not_laid_out_in_order(n_batch, n_tokens, most):
    """Transposed entries, and gradients that are one expanded number."""
    chosen = selection.Chosen(*fused.first_tokens(chosen_tokens(n_batch + 1, n_tokens)[:-1], most))
    h = torch.randn(n_tokens, n_batch, 6, device=DEVICE).transpose(0, 1).requires_grad_()
    found = torch.randn(6, n_batch, most, device=DEVICE).permute(1, 2, 0).requires_grad_()
    taken = fused.take(h, *chosen, 0)
    y = fused.put(chosen.rank, chosen.token, chosen.there, found, h)
    assert torch.equal(taken, selection.take(h.cpu(), selection.Chosen(*(t.cpu() for t in chosen))).to(DEVICE))
    to_taken, (to_found, to_h) = torch.autograd.grad(taken.sum(), h)[0], torch.autograd.grad(y.sum(), [found, h])
    is_chosen = (to_taken == 1).all(dim=-1)
    assert torch.equal(is_chosen.sum(dim=1), chosen.there.sum(dim=1))
    assert torch.equal(to_h, 1 - to_taken)
    assert torch.equal(to_found, chosen.there[..., None].expand_as(found).float())


@kernels.wanted
@kernels.protest
def test_kernel_takes_whole_numbers():
    chosen = selection.first_tokens(chosen_tokens(), 21)
    x = torch.randint(100, (3, 50), device=DEVICE)
    expected = x.gather(1, chosen.token).where(chosen.there, -1)
    assert torch.equal(fused.take(x, *chosen, -1), expected)


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_kernel_sums_the_same(dtype, monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 16)
    x = chosen_tokens() if dtype == torch.bool else torch.rand(3, 50, device=DEVICE).to(dtype)
    found = fused.running_sum(x)
    assert found.dtype == x.cumsum(dim=1).dtype
    assert torch.allclose(found.double(), x.double().cumsum(dim=1), atol=0.2 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_is_taken_of_sequences_without_tokens():
    h, chosen = torch.zeros(2, 0, 4), selection.first_tokens(torch.zeros(2, 0, dtype=torch.bool), 0)
    assert selection.take(h, chosen).shape == selection.put_onto(h, chosen, h).shape == (2, 0, 4)
