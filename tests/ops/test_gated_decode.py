"""Decoding behind a gate: the reference against plain attention, the kernels against the reference.

The kernels run on CUDA, on a CPU only in Triton's interpreter.
"""

import kernels
import pytest
import torch
from kernels import DEVICE
from torch.nn import functional as F

from cramlab.ops.gated_decode import fused, naive

WINDOW, N_SINKS = 20, 3
FIRST, END = (0, 7, 0, 130, 40), (200, 200, 199, 152, 41)  # the last but one has no far key, the last only its own


def example(width, n_heads=6, n_groups=2, dtype=torch.float32, n_places=210):
    n_batch = len(FIRST)
    query = torch.randn(n_batch, n_heads, width, device=DEVICE, dtype=dtype)
    key, value = (torch.randn(n_batch, n_groups, n_places, width, device=DEVICE, dtype=dtype) for _ in range(2))
    first, end = (torch.tensor(places, device=DEVICE) for places in (FIRST, END))
    for b, (begin, stop) in enumerate(zip(FIRST, END, strict=True)):  # a hidden key that is used would show
        for entries in (key, value):
            entries[b, :, :begin] = torch.nan
            entries[b, :, stop:] = torch.nan
    return query, key, value, first, end


@pytest.mark.parametrize("n_groups", [1, 2, 6])
def test_reference_equals_plain_attention_of_each_sequence(n_groups):
    query, key, value, first, end = example(16, n_groups=n_groups)
    key, value = key.nan_to_num(), value.nan_to_num()
    scale = 0.3
    near = naive.near_read(query, key, value, first, end, WINDOW, N_SINKS, scale)
    opened, shut = (
        naive.gated_read(near, torch.full((5, 1), gate, device=DEVICE), query, key, value, first, end,
                         WINDOW, N_SINKS, scale) for gate in (True, False)
    )  # fmt: skip
    full = naive.full_read(query, key, value, first, end, scale)
    assert torch.equal(shut, near[0])
    for b, (begin, stop) in enumerate(zip(FIRST, END, strict=True)):
        everything = list(range(begin, stop))
        sinks = everything[:N_SINKS]
        recent = [place for place in everything[-WINDOW:] if place not in sinks]
        for places, found in ((everything, opened), (everything, full), (sinks + recent, near[0])):
            k, v = (entries[b, :, places].repeat_interleave(6 // n_groups, dim=0) for entries in (key, value))
            expected = F.scaled_dot_product_attention(query[b, :, None], k, v, scale=scale)[:, 0]
            assert torch.allclose(found[b], expected, atol=1e-5)
        k = key[b].repeat_interleave(6 // n_groups, dim=0)
        for part, places in enumerate((recent, sinks)):
            expected = (scale * (k[:, places] @ query[b, :, :, None])[..., 0]).logsumexp(-1).clamp(min=naive.NO_MASS)
            assert torch.allclose(near[1][b, part], expected, atol=1e-5)


def twin(query, key, value, first, end, *others, reads=None):
    """The reference implementation in double precision, with hidden keys set to zero."""
    given = query.double(), key.nan_to_num().double(), value.nan_to_num().double(), first, end, *others
    near = naive.near_read(*given)
    return (*near, naive.gated_read(near, reads, *given), naive.full_read(*given[:5], others[2]))


@kernels.wanted
@kernels.protest
@pytest.mark.parametrize(("width", "n_heads", "n_groups"), [(16, 6, 2), (32, 3, 1), (64, 4, 4), (128, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_head", [False, True])
def test_kernels_equal_reference(width, n_heads, n_groups, dtype, by_head, monkeypatch):
    """Over one split and several, some of them empty; left padding; sequences without far keys."""
    monkeypatch.setattr(fused, "_LEAST_SPLIT", 40 if by_head else 256)
    query, key, value, first, end = example(width, n_heads, n_groups, dtype)
    reads = torch.rand(len(query), n_groups if by_head else 1, device=DEVICE) < 0.6
    reads[0], reads[1] = True, False
    others = (WINDOW, N_SINKS, width**-0.5)
    heads, masses, gated, full = twin(query, key, value, first, end, *others, reads=reads)
    near = fused.near_read(query, key, value, first, end, *others)
    found = fused.gated_read(near, reads, query, key, value, first, end, *others)
    everything = fused.full_read(query, key, value, first, end, others[2])
    limit = 2e-5 if dtype == torch.float32 else 0.02
    for a, b in ((near[0], heads), (near[1], masses), (found, gated), (everything, full)):
        assert torch.allclose(a.double(), b, atol=limit, rtol=limit)


@kernels.wanted
@kernels.protest
def test_no_far_key_is_loaded_behind_a_shut_gate():
    """A far value that is not a number would show."""
    query, key, value, first, end = example(16)
    value[0, 1, N_SINKS : END[0] - WINDOW] = torch.nan
    others = (WINDOW, N_SINKS, 0.25)
    near = fused.near_read(query, key, value, first, end, *others)
    reads = torch.tensor([[True, False]], device=DEVICE).expand(5, -1)
    found = fused.gated_read(near, reads, query, key, value, first, end, *others)
    assert found.isfinite().all()
    assert torch.equal(found[:, 3:], near[0][:, 3:])
    opened = fused.gated_read(near, torch.ones_like(reads), query, key, value, first, end, *others)
    assert opened[0, 3:].isnan().all()


@kernels.wanted
@kernels.protest
def test_gates_by_sequence_hold_for_all_of_its_heads():
    query, key, value, first, end = example(16)
    others = (WINDOW, N_SINKS, 0.25)
    near = fused.near_read(query, key, value, first, end, *others)
    rows = torch.tensor([True, False, False, True, True], device=DEVICE)[:, None]
    by_row = fused.gated_read(near, rows, query, key, value, first, end, *others)
    by_head = fused.gated_read(near, rows.expand(-1, 2).contiguous(), query, key, value, first, end, *others)
    assert torch.equal(by_row, by_head)
    assert not torch.equal(by_row[0], near[0][0])


def test_splits_are_long_enough_and_few_enough():
    assert fused.n_splits_of(300, 8) == 1
    assert fused.n_splits_of(32768, 8) == 66
    assert fused.n_splits_of(1 << 20, 1) == 128
