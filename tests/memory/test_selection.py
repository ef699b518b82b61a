"""Choosing tokens: the kernel against its slow twin. On a CPU only in Triton's interpreter."""

import os

import pytest
import torch

from cramlab.memory import selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="wants CUDA or TRITON_INTERPRET=1")
interpreter = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def chosen_tokens(n_batch=3, n_tokens=50):
    chosen = torch.rand(n_batch, n_tokens) < 0.3
    chosen[-1] = False
    return chosen.to(DEVICE)


def test_first_tokens_in_order():
    token, there = selection.first_tokens(torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool(), 2)
    assert token[0].tolist() == [1, 3]
    assert (token[1, 0], there.tolist()) == (0, [[True, True], [True, False]])


def test_rows_and_places():
    h = torch.arange(12.0).view(2, 3, 2)
    token, there = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[True, True], [True, False]])
    assert torch.equal(selection.rows_at(h, token), torch.stack([h[0, [0, 2]], h[1, [1, 2]]]))
    assert selection.flat_places(token, there, 3).tolist() == [0, 2, 4, 6]


@kernel
@interpreter
@pytest.mark.parametrize("most", [1, 4, 40, 50])
@pytest.mark.parametrize("n_tokens", [50, 64, 7])
def test_kernel_finds_the_same_tokens(most, n_tokens, monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 16)
    chosen = chosen_tokens(n_tokens=n_tokens)
    with_kernel = selection._first_tokens(chosen, most)
    without = selection.first_tokens(chosen.cpu(), most)
    for fast, slow in zip(with_kernel, without, strict=True):
        assert torch.equal(fast.cpu(), slow)


@kernel
@interpreter
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_kernel_sums_the_same(dtype, monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 16)
    x = chosen_tokens() if dtype == torch.bool else torch.rand(3, 50, device=DEVICE).to(dtype)
    found = selection._running_sum(x)
    assert found.dtype == x.cumsum(dim=1).dtype
    assert torch.allclose(found.double(), x.double().cumsum(dim=1), atol=0.2 if dtype == torch.bfloat16 else 1e-5)
