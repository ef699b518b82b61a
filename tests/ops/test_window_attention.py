import pytest
import torch

from cramlab.ops.read import windows as module
from cramlab.ops.read.windows import tiles, window_attention

D, N_HEADS = 8, 2


def windows(n_readers, n_places, widest):
    last = torch.randint(n_places, (n_readers,)).sort().values
    first = torch.randint(n_places, (n_readers,)).sort().values
    first = torch.minimum(torch.maximum(first, last - widest), last).cummax(dim=0).values
    return torch.minimum(first, last).tolist(), last.tolist()


def obvious(q, k, v, first, last):
    """Reader by reader and head by head."""
    rows = []
    for query, a, b in zip(q, first, last, strict=True):
        heads = []
        for h in range(N_HEADS):
            part = slice(h * D // N_HEADS, (h + 1) * D // N_HEADS)
            weights = torch.softmax(k[a : b + 1, part] @ query[part] / (D // N_HEADS) ** 0.5, dim=0)
            heads.append(weights @ v[a : b + 1, part])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("widest", [0, 5, 1000])
@pytest.mark.parametrize(("n_readers", "n_places"), [(1, 1), (1, 50), (7, 3), (40, 120)])
@pytest.mark.parametrize("small", [False, True])
def test_tiled_attention_equals_reader_by_reader_with_gradients(n_readers, n_places, widest, small, monkeypatch):
    if small:  # many tiles, blocks of readers, and the ends of both
        monkeypatch.setattr(module, "_READERS", 11)
        monkeypatch.setattr(module, "_SLOTS", 7)
        monkeypatch.setattr(module, "_WORTH_A_TILE", 1)
    given = [torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (n_readers, n_places, n_places)]
    first, last = windows(n_readers, n_places, widest)
    fast, slow = window_attention(*given, first, last, N_HEADS), obvious(*given, first, last)
    assert torch.allclose(fast, slow, atol=1e-10)
    weight = torch.randn_like(fast)
    gradients = [torch.autograd.grad((y * weight).sum(), given) for y in (fast, slow)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


def test_scores_that_differ_by_thousands_are_no_trouble(monkeypatch):
    """The largest score of a later tile is what the sums of earlier ones are measured by."""
    monkeypatch.setattr(module, "_SLOTS", 100)
    q, k, v = torch.ones(1, 2), torch.zeros(3000, 2), torch.randn(3000, 2)
    k[2500] = 1e4
    assert torch.equal(window_attention(q, k, v, [0], [2999], 1), v[2500:2501])
    assert torch.allclose(window_attention(q, -k, v, [0], [2499], 1), v[:2500].mean(dim=0, keepdim=True), atol=1e-5)


def test_every_pair_is_in_one_tile_and_few_others_are():
    first, last = [0] * 300, list(range(0, 30000, 100))
    seen = torch.zeros(300, 30000, dtype=torch.int8)
    for tile in tiles(first, last):
        seen[tile.i : tile.j, tile.a : tile.b] += 1
    visible = torch.arange(30000) <= torch.tensor(last)[:, None]
    assert (seen[visible] == 1).all()
    assert seen.sum() < 1.1 * visible.sum()
    assert list(tiles([], [])) == []


def test_half_precision_is_summed_in_single():
    q, k, v = (torch.randn(n, D, dtype=torch.bfloat16) for n in (100, 3000, 3000))
    first, last = windows(100, 3000, 3000)
    assert len(list(tiles(first, last))) > 1
    found = window_attention(q, k, v, first, last, N_HEADS)
    exact = window_attention(q.double(), k.double(), v.double(), first, last, N_HEADS)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, atol=1e-2)
