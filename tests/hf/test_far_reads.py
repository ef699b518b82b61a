"""Window and gathered reads against attention under a dense mask, outputs and gradients."""

import pytest
import torch

from cramlab.hf.far_reads import Padding, far_read, has_far, window_read


def tensors(n_tokens, n_keys, n_batch=2, n_heads=4, n_groups=2, d_head=6, requires_grad=False):
    generator = torch.Generator().manual_seed(n_tokens * 1000 + n_keys)
    shapes = [(n_batch, n_heads, n_tokens, d_head)] + 2 * [(n_batch, n_groups, n_keys, d_head)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad) for shape in shapes
    ]


def dense(query, key, value, allowed, scale):
    """Attention under a mask (B, T, S) over all keys, and its scores."""
    key, value = (entries.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for entries in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    masked = scores.masked_fill(~allowed[:, None], -torch.inf)
    return (masked.softmax(dim=-1) @ value).transpose(1, 2), scores


def allowed_in_window(n_tokens, n_keys, window, n_sinks, first, n_batch=2):
    """(B, T, S), token by token."""
    near = torch.zeros(n_batch, n_tokens, n_keys, dtype=torch.bool)
    sinks = torch.zeros_like(near)
    for b in range(n_batch):
        for t in range(n_tokens):
            own = n_keys - n_tokens + t
            for s in range(first[b], own + 1):
                sinks[b, t, s] = s < first[b] + n_sinks
                near[b, t, s] = s > own - window and not sinks[b, t, s]
    return near, sinks


CASES = [(t, t + before, window, sinks) for t in (1, 2, 17, 40) for before in (0, 5, 30) for window in (1, 4, 16, 64)
         for sinks in (0, 3)]  # fmt: skip


@pytest.mark.parametrize(("n_tokens", "n_keys", "window", "n_sinks"), CASES)
@pytest.mark.parametrize("first", [(0, 0), (0, 3)])
def test_the_window_is_attention_under_a_mask(n_tokens, n_keys, window, n_sinks, first):
    if n_keys - n_tokens < max(first) or (window == 1 and n_sinks == 0 and n_tokens > 17):
        first = (0, 0)  # padding tokens see nothing
    query, key, value = tensors(n_tokens, n_keys, requires_grad=True)
    padding = None
    if any(first):
        visible = torch.arange(n_keys) >= torch.tensor(first)[:, None]
        padding = Padding(visible, torch.tensor(first))
    near, sinks = allowed_in_window(n_tokens, n_keys, window, n_sinks, first)
    wanted, scores = dense(query, key, value, near | sinks, 0.3)
    got = window_read(query, key, value, window=window, n_sinks=n_sinks, scale=0.3, padding=padding)
    torch.testing.assert_close(got.heads, wanted)
    # Masses mean something only where there is something to weigh.
    far = (near | sinks).sum(-1) == window + n_sinks
    masses = torch.stack([scores.masked_fill(~ok[:, None], -1e30).logsumexp(-1) for ok in (near, sinks)])
    masses = masses.clamp(min=-50).permute(1, 3, 0, 2).flatten(2)
    torch.testing.assert_close(got.masses[far], masses[far])
    direction = torch.randn(wanted.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((got.heads * direction).sum(), (query, key, value)),
        torch.autograd.grad((wanted * direction).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("n_tokens", "n_keys"), [(1, 1), (1, 40), (17, 17), (300, 320)])
@pytest.mark.parametrize("frac", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("first", [(0, 0), (0, 3)])
def test_readers_get_the_full_attention(n_tokens, n_keys, frac, first):
    if n_keys - n_tokens < max(first):
        first = (0, 0)
    query, key, value = tensors(n_tokens, n_keys, requires_grad=True)
    reads = torch.rand(2, n_tokens) < frac
    visible = torch.arange(n_keys) >= torch.tensor(first)[:, None]
    causal = torch.arange(n_keys) <= torch.arange(n_keys - n_tokens, n_keys)[:, None]
    wanted = dense(query, key, value, causal & visible[:, None], 0.3)[0][reads]
    padding = Padding(visible, torch.tensor(first)) if any(first) else None
    got, n_scored = far_read(query, key, value, reads, scale=0.3, padding=padding)
    torch.testing.assert_close(got, wanted)
    least = sum(int(t) + 1 + n_keys - n_tokens for _, t in reads.nonzero())  # one key more a token
    assert least <= n_scored <= max(1, int(reads.sum())) * n_keys
    if bool(reads.any()):
        direction = torch.randn(wanted.shape, dtype=torch.float64)
        for ours, theirs in zip(
            torch.autograd.grad((got * direction).sum(), (query, key, value), allow_unused=True),
            torch.autograd.grad((wanted * direction).sum(), (query, key, value), allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_the_far_past_is_not_touched():
    """NaN in the far keys and values reaches no window."""
    query, key, value = tensors(20, 100)
    key[:, :, 3:60] = torch.nan
    value[:, :, 3:60] = torch.nan
    got = window_read(query, key, value, window=16, n_sinks=3, scale=1.0, padding=None)
    assert bool(torch.isfinite(got.heads).all())
    assert got.n_scored == 2 * 2 * 16 * (16 + 16 - 1 + 3)  # two blocks of 16 queries against their bands


def test_who_has_far_keys():
    assert has_far(4, 20, 16, 2, None, torch.zeros(())).tolist() == [[False, False, True, True]]
    padding = Padding(torch.arange(20) >= torch.tensor([[0], [1]]), torch.tensor([0, 1]))
    assert has_far(4, 20, 16, 2, padding, torch.zeros(())).tolist()[1] == [False, False, False, True]


def test_padding_is_read_off_the_mask_and_other_masks_are_refused():
    causal = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    assert Padding.of(None) is None
    assert Padding.of(causal) is None
    left = causal & (torch.arange(6) >= torch.tensor([0, 2])[:, None])[:, None, None]
    padding = Padding.of(left)
    assert padding is not None
    assert padding.first.tolist() == [0, 2]
    blocks = torch.block_diag(*2 * [torch.ones(3, 3).tril()]).bool().expand(1, 1, 6, 6)
    with pytest.raises(ValueError, match="packed"):
        Padding.of(blocks)
    with pytest.raises(ValueError, match="no mask of tokens"):
        Padding.of(torch.zeros(1, 1, 6, 6))
