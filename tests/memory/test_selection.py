"""Choosing tokens: the kernel against its slow twin. On a CPU only in Triton's interpreter."""

import kernels
import pytest
import torch
from kernels import DEVICE

from cramlab.memory import selection


def chosen_tokens(n_batch=3, n_tokens=50):
    chosen = torch.rand(n_batch, n_tokens) < 0.3
    chosen[-1] = False
    return chosen.to(DEVICE)


def test_first_tokens_in_order():
    token, there, rank = selection.first_tokens(torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool(), 2)
    assert rank.tolist() == [[0, 1, 1, 2, 3], [1, 1, 1, 1, 1]]
    assert token[0].tolist() == [1, 3]
    assert (token[1, 0], there.tolist()) == (0, [[True, True], [True, False]])


def test_rows_and_places():
    h = torch.arange(12.0).view(2, 3, 2)
    token, there = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[True, True], [True, False]])
    assert selection.entries_at(h[..., 0], token, there, -1).tolist() == [[0, 4], [8, -1]]
    assert torch.equal(selection.rows_at(h, token), torch.stack([h[0, [0, 2]], h[1, [1, 2]]]))
    assert selection.flat_places(token, there, 3).tolist() == [0, 2, 4, 6]


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize("most", [0, 1, 4, 40, 70])
@pytest.mark.parametrize("n_tokens", [50, 64, 7, 0])
def test_kernel_finds_the_same_tokens(most, n_tokens, monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 16)
    chosen = chosen_tokens(n_tokens=n_tokens)
    with_kernel = selection._first_tokens(chosen, most)
    without = selection.first_tokens(chosen.cpu(), most)
    for fast, slow in zip(with_kernel, without, strict=True):
        assert torch.equal(fast.cpu(), slow)


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("all_there", [False, True])
def test_kernel_takes_the_same_entries(dtype, all_there, monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 16)
    x = (torch.rand(3, 50, device=DEVICE) * 100).to(dtype)
    token = torch.randint(50, (3, 21), device=DEVICE)
    there = None if all_there else torch.rand(3, 21, device=DEVICE) < 0.5
    expected = selection.entries_at(*(t if t is None else t.cpu() for t in (x, token, there)), -1)
    assert torch.equal(selection._entries_at(x, token, there, -1).cpu(), expected)


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_kernel_sums_the_same(dtype, monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 16)
    x = chosen_tokens() if dtype == torch.bool else torch.rand(3, 50, device=DEVICE).to(dtype)
    found = selection._running_sum(x)
    assert found.dtype == x.cumsum(dim=1).dtype
    assert torch.allclose(found.double(), x.double().cumsum(dim=1), atol=0.2 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_is_taken_of_sequences_without_tokens():
    h = torch.zeros(2, 0, 4)
    assert selection.rows_at(h, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 4)
