"""Window and gathered reads against attention under a dense mask, outputs and gradients."""

import pytest
import torch

from cramlab.consolidation.patch.reads import Scoring, _softmax, far_read, read_by_heads, window_read
from cramlab.consolidation.patch.visibility import Mask, Padding, n_keys_seen, visibility
from cramlab.errors import ConsolidationError


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
    got = window_read(query, key, value, window=window, n_sinks=n_sinks, scoring=Scoring(0.3), seen=padding)
    torch.testing.assert_close(got.heads, wanted)
    # Masses mean something only where there is something to weigh.
    far = (near | sinks).sum(-1) == window + n_sinks
    masses = torch.stack([scores.masked_fill(~ok[:, None], -1e30).logsumexp(-1) for ok in (near, sinks)])
    masses = masses.clamp(min=-50).permute(1, 3, 0, 2).flatten(2)
    torch.testing.assert_close(got.masses[far], masses[far])
    direction = torch.randn(wanted.shape, dtype=torch.float64)
    of_masses = torch.randn(masses.shape, dtype=torch.float64) * far[..., None]
    for ours, theirs in zip(
        torch.autograd.grad((got.heads * direction).sum() + (got.masses * of_masses).sum(), (query, key, value)),
        torch.autograd.grad((wanted * direction).sum() + (masses * of_masses).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_equal_and_hidden_scores_have_the_masses_and_gradients_of_a_log_sum_exp():
    scores = torch.tensor([[1.0, 1.0, 1.0], [2.0, -1e30, 2.0 - 1e-7], [-1e30, -1e30, -1e30], [200.0, -200.0, 0.0]])
    scores = scores.requires_grad_()
    weights, mass = _softmax(scores)
    torch.testing.assert_close(mass.squeeze(-1), scores.logsumexp(-1))
    torch.testing.assert_close(torch.autograd.grad(mass.sum(), scores)[0], weights.detach())
    torch.testing.assert_close(weights, scores.softmax(-1))
    nothing, least = _softmax(scores[:, :0])
    assert nothing.shape == (4, 0)
    assert bool((least == -1e30).all())


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
    got, n_scored = far_read(query, key, value, reads, scoring=Scoring(0.3), seen=padding)
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


@pytest.mark.parametrize("n_tokens", [1, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_a_learned_sink_is_one_more_key_without_a_value(n_tokens, masked):
    """The twin appends a key whose score is the sink's and whose value is zero."""
    query, key, value = tensors(n_tokens, 40)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)
    scoring, near = Scoring(0.3, sinks=sinks), allowed_in_window(n_tokens, 40, 8, 2, (0, 0))
    causal = torch.arange(40) <= torch.arange(40 - n_tokens, 40)[:, None]

    def twin(allowed):
        scores = dense(query, key, value, allowed, 0.3)[1].masked_fill(~allowed[:, None], -torch.inf)
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(2, -1, n_tokens, 1)], dim=-1)
        values = torch.nn.functional.pad(value.repeat_interleave(2, dim=1), (0, 0, 0, 1))
        return (scores.softmax(dim=-1) @ values).transpose(1, 2)

    seen = None
    if masked:
        allowed = causal.expand(2, 4, -1, -1)
        seen = Mask(allowed, None, torch.ones(2, n_tokens, dtype=torch.bool))
    got = window_read(query, key, value, window=8, n_sinks=2, scoring=scoring, seen=seen)
    torch.testing.assert_close(got.heads, twin(near[0] | near[1]))
    reads = torch.rand(2, n_tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    reads[0, -1] = True
    full = twin(causal.expand(2, -1, -1))
    answers, _ = far_read(query, key, value, reads, scoring=scoring, seen=seen)
    torch.testing.assert_close(answers, full[reads])
    by_head = reads[..., None] & torch.tensor([True, False, True, True])
    heads, _ = read_by_heads(got.heads, query, key, value, by_head, scoring=scoring, seen=seen)
    torch.testing.assert_close(heads, torch.where(by_head[..., None], full, got.heads))


def test_the_far_past_is_not_touched():
    """NaN in the far keys and values reaches no window."""
    query, key, value = tensors(20, 100)
    key[:, :, 3:60] = torch.nan
    value[:, :, 3:60] = torch.nan
    got = window_read(query, key, value, window=16, n_sinks=3, scoring=Scoring(1.0), seen=None)
    assert bool(torch.isfinite(got.heads).all())
    assert got.n_scored == 2 * 2 * 16 * (16 + 16 - 1 + 3)  # two blocks of 16 queries against their bands


def test_how_many_keys_a_token_sees():
    assert n_keys_seen(None, 1, 4, 16, torch.device("cpu")).tolist() == [[17, 18, 19, 20]]
    padding = Padding(torch.arange(20) >= torch.tensor([[0], [1]]), torch.tensor([0, 1]))
    assert n_keys_seen(padding, 2, 4, 16, torch.device("cpu")).tolist() == [[17, 18, 19, 20], [16, 17, 18, 19]]


CAUSAL = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
BLOCKS = torch.block_diag(*2 * [torch.ones(3, 3).tril()]).bool().expand(1, 1, 6, 6)


def test_masks_of_causality_and_padding_are_read_as_such():
    assert visibility(None, 2, 3, 6, 0) is None
    assert visibility(CAUSAL, 2, 3, 6, 0) is None
    assert visibility(torch.zeros(2, 1, 6, 6).masked_fill(~CAUSAL, torch.finfo(torch.float32).min), 2, 3, 6, 0) is None
    assert visibility(CAUSAL[:, :, 4:], 2, 3, 2, 4) is None
    assert visibility(torch.nn.functional.pad(CAUSAL, (0, 3)), 2, 3, 6, 0) is None  # places that are not written yet
    places = torch.arange(6)
    left = visibility(CAUSAL & (places >= torch.tensor([0, 2])[:, None])[:, None, None], 2, 3, 6, 0)
    right = visibility(CAUSAL & (places < torch.tensor([6, 4])[:, None])[:, None, None], 2, 3, 6, 0)
    assert isinstance(left, Padding)
    assert isinstance(right, Padding)
    assert left.first.tolist() == [0, 2]
    assert right.first.tolist() == [0, 0]
    assert n_keys_seen(right, 2, 6, 0, torch.device("cpu")).tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 0]]


def test_other_causal_masks_are_kept_and_those_that_are_not_causal_are_refused():
    for mask in (BLOCKS, CAUSAL & (torch.arange(6) != 2), torch.randn(2, 1, 6, 6).masked_fill(~CAUSAL, -torch.inf)):
        assert isinstance(visibility(mask, 2, 3, 6, 0), Mask)
    assert visibility(BLOCKS, 2, 3, 6, 0).bias is None
    with pytest.raises(ConsolidationError, match="later ones"):
        visibility(torch.ones(1, 1, 6, 6, dtype=torch.bool), 2, 3, 6, 0)
    with pytest.raises(ConsolidationError, match=r"torch\.int64"):
        visibility(CAUSAL.long(), 2, 3, 6, 0)
    with pytest.raises(ConsolidationError, match=r"\(2, 1, 6, 6\)"):
        visibility(CAUSAL, 2, 3, 6, 3)


@pytest.mark.parametrize("n_heads_of_mask", [1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_any_causal_mask_is_the_window_and_the_read_counted_among_the_keys_seen(n_heads_of_mask, softcap, biased):
    """Token by token, in double precision: window and first keys by counting what is seen; keys and values differ."""
    n_tokens, n_keys, window, n_sinks = 9, 14, 3, 2
    query, key, value = tensors(n_tokens, n_keys)
    value = torch.cat([value, value[..., :3]], dim=-1)
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(2, n_heads_of_mask, n_tokens, n_keys, generator=generator) < 0.7
    allowed &= torch.arange(n_keys) <= torch.arange(n_keys - n_tokens, n_keys)[:, None]
    allowed |= torch.eye(n_keys, dtype=torch.bool)[n_keys - n_tokens :]
    bias = torch.randn(allowed.shape, generator=generator, dtype=torch.float64) if biased else torch.zeros(())
    mask = torch.where(allowed, bias.double(), -torch.inf) if biased else allowed
    seen, scoring = visibility(mask, 2, 4, n_tokens, n_keys - n_tokens), Scoring(0.3, softcap)
    assert isinstance(seen, Mask)
    got = window_read(query, key, value, window=window, n_sinks=n_sinks, scoring=scoring, seen=seen)
    reads = torch.rand(2, n_tokens, generator=generator) < 0.6
    answers, _ = far_read(query, key, value, reads, scoring=scoring, seen=seen)
    by_place = dict(zip(map(tuple, reads.nonzero().tolist()), answers, strict=True))
    counted = n_keys_seen(seen, 2, n_tokens, n_keys - n_tokens, torch.device("cpu"))
    for b in range(2):
        for t in range(n_tokens):
            visible = [s for s in range(n_keys) if allowed[b, :, t, s].any()]
            assert int(counted[b, t]) == len(visible)
            near = set(visible[:n_sinks] + visible[-window:])
            for h in range(4):
                own = h if n_heads_of_mask == 4 else 0
                scores = 0.3 * key[b, h // 2] @ query[b, h, t]
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                scores = scores + bias[b, own, t] if biased else scores

                def attended(places, own=own, scores=scores, b=b, t=t, h=h):
                    places = [s for s in places if allowed[b, own, t, s]]
                    return scores[places].softmax(0) @ value[b, h // 2, places] if places else None

                wanted = attended(near)
                if wanted is not None:
                    torch.testing.assert_close(got.heads[b, t, h], wanted)
                if reads[b, t]:
                    torch.testing.assert_close(by_place[b, t][h], attended(visible))
