"""A mask that the original honours gives what the rule gives to the same tokens, or is refused before anything runs."""

import pytest
import torch
from families import documents
from patches import EVERYTHING, at, layers_for, model_of
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, StaticCache

from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.consolidation.patch.install import patched
from cramlab.errors import ConsolidationError

N = 40
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return model_of(request.param)


def tokens_of(n_batch=2, n_tokens=N):
    return torch.stack(documents(n_batch, n_tokens))


def counted(layers):
    return [layer.counts.far_reads for layer in layers.values()]


def test_hidden_tokens_anywhere_are_as_if_they_were_not_there(model):
    """Among the first keys, in the window, in the far past; a token's position is the one it has."""
    tokens, layers = tokens_of(), layers_for(model)
    mask = torch.ones_like(tokens)
    mask[0, [0, 5, 6, 20]] = 0
    mask[1, [1, 2, 30, 31, 32]] = 0
    places = torch.arange(N)[None]
    with patched(model, layers):
        together = model(tokens, attention_mask=mask, position_ids=places.expand(2, -1)).logits
        reads = counted(layers)
        for layer in layers.values():
            layer.tally.reset()
        for b in range(2):
            kept = mask[b].bool()
            alone = model(tokens[b : b + 1, kept], position_ids=places[:, kept]).logits
            torch.testing.assert_close(together[b, kept], alone[0], **CLOSE)
        assert counted(layers) == reads
        assert 0 < sum(reads) < sum(layer.counts.far_tokens for layer in layers.values())


def test_right_padding_then_more_tokens_is_the_prompt_then_more_tokens(model):
    tokens, mask = tokens_of(), torch.ones(2, N, dtype=torch.int64)
    mask[0, 12:20] = 0  # a prompt of twelve in a batch padded to twenty
    places = torch.cat([torch.arange(20).expand(2, -1), torch.tensor([[12], [20]]) + torch.arange(20)], dim=1)
    with patched(model, layers_for(model)):
        cache = DynamicCache(config=model.config)
        parts = [
            model(tokens[:, a:b], attention_mask=mask[:, :b], position_ids=places[:, a:b], past_key_values=cache).logits
            for a, b in ((0, 20), *((i, i + 1) for i in range(20, N)))
        ]
        together = torch.cat(parts, dim=1)
        for b in range(2):
            kept = mask[b].bool()
            alone = model(tokens[b : b + 1, kept], position_ids=places[b : b + 1, kept]).logits
            torch.testing.assert_close(together[b, kept], alone[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_none(model, side):
    tokens = tokens_of()
    mask = torch.ones_like(tokens)
    hidden, kept = (slice(0, 9), slice(9, N)) if side == "left" else (slice(N - 9, N), slice(0, N - 9))
    mask[0, hidden] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with patched(model, layers_for(model)):
        together = model(tokens, attention_mask=mask, position_ids=places).logits
        torch.testing.assert_close(together[0, kept], model(tokens[:1, kept]).logits[0], **CLOSE)
        torch.testing.assert_close(together[1], model(tokens[1:]).logits[0], **CLOSE)


def test_packed_documents_are_the_documents():
    model = model_of("llama")  # which reads blocks off positions that start again
    tokens, sizes = tokens_of(1, 60), (25, 12, 23)
    places = torch.cat([torch.arange(n) for n in sizes])[None]
    with patched(model, layers_for(model)):
        together = model(tokens, position_ids=places, use_cache=False).logits
        alone = [model(part).logits for part in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(together, torch.cat(alone, dim=1), **CLOSE)


@pytest.mark.parametrize("kind", ["bool", "float", "-1e4", "-1e9"])
def test_a_mask_of_four_dimensions_is_the_mask_of_two(model, kind):
    tokens = tokens_of()
    mask = torch.ones_like(tokens)
    mask[0, [0, 5, 6, 20]] = 0
    four = torch.ones(N, N).tril().bool() & mask[:, None, None].bool()
    if kind != "bool":
        least = torch.finfo(torch.float32).min if kind == "float" else float(kind)
        four = torch.zeros(four.shape).masked_fill(~four, least)
    places = torch.arange(N).expand(2, -1)
    with patched(model, layers_for(model)):
        wanted = model(tokens, attention_mask=mask, position_ids=places).logits[mask.bool()]
        got = model(tokens, attention_mask=four, position_ids=places).logits[mask.bool()]
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_with_every_read_made_any_causal_mask_gives_the_originals_logits(model):
    tokens, generator = tokens_of(), torch.Generator().manual_seed(0)
    causal = torch.ones(N, N).tril().bool()
    stretch = causal.clone()
    stretch[20:30, :15] = False  # which some tokens may not see, though later ones may
    blind = causal.clone()
    blind[25] = False  # a token that sees nothing, though later ones see it
    own = torch.eye(N).bool()
    lot = (causal & (torch.rand(2, 1, N, N, generator=generator) < 0.6)) | own
    heads = (causal & (torch.rand(2, 3, N, N, generator=generator) < 0.6)) | own
    biased = torch.randn(1, 3, N, N, generator=generator).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (stretch.expand(2, 1, N, N), blind.expand(1, 1, N, N), lot, heads, biased):
        wanted = model(tokens, attention_mask=mask).logits
        with patched(model, at(layers_for(model), EVERYTHING)):
            torch.testing.assert_close(model(tokens, attention_mask=mask).logits, wanted, **CLOSE)


def test_masks_that_are_not_causal_or_do_not_fit_are_refused_before_anything_runs(model):
    tokens, ran = tokens_of(), []
    with patched(model, layers_for(model)):
        model.get_input_embeddings().register_forward_hook(lambda *_: ran.append("embedding"))
        for mask, message in (
            (torch.ones(2, 1, N, N, dtype=torch.bool), "later ones"),
            (torch.ones(2, 1, N, N, dtype=torch.int64).tril(), r"torch\.int64"),
            (torch.ones(2, 1, N, N - 3, dtype=torch.bool), r"give \(batch, keys\)"),
            (torch.ones(2, N, N).tril().bool(), r"give \(batch, keys\)"),
            (torch.ones(2, 2, N, N).tril().bool(), r"here \(2, 3, 40, 40\)"),
            (torch.ones(3, 1, N, N).tril().bool(), r"here \(2, 3, 40, 40\)"),
            (torch.ones(1, N, dtype=torch.int64), "1 rows for 2 sequences"),
        ):
            with pytest.raises(ConsolidationError, match=message):
                model(tokens, attention_mask=mask)
        assert not ran
        model.config.is_causal = False
        with pytest.raises(ConsolidationError, match="is_causal"):
            model(tokens)
        assert not ran
        model.config.is_causal = True
        torch.testing.assert_close(model(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_one_mask_for_all_rows_is_that_mask_for_each(model):
    tokens, mask = tokens_of(), torch.ones(1, N, dtype=torch.int64)
    mask[0, :5] = 0
    four = torch.ones(N, N).tril().bool() & mask[:, None, None].bool()
    with patched(model, layers_for(model)):
        wanted = model(tokens, attention_mask=mask.expand(2, -1)).logits[:, 5:]
        torch.testing.assert_close(model(tokens, attention_mask=four).logits[:, 5:], wanted, **CLOSE)


class Counting(FarReads):
    """Reads every second place."""

    def decide(self, seen):
        places = torch.arange(seen.start, seen.start + seen.far.shape[1])
        return (places % 2 == 0).expand_as(seen.far), None


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_places_are_those_of_the_call_not_of_the_caches_length(model, kind):
    """Chunks into a cache with room for more than is ever written."""
    tokens, sizes = tokens_of(), [7, 13, 1, 1, 18]
    mask = torch.ones_like(tokens)
    mask[0, [0, 9]] = 0
    layers = {i: Counting(window=6, n_sinks=2) for i in layers_for(model)}
    make = {"dynamic": lambda: DynamicCache(config=model.config), "static": lambda: StaticCache(model.config, 53)}[kind]
    for hidden in (None, mask):
        with patched(model, layers):
            given = {} if hidden is None else {"attention_mask": hidden, "position_ids": torch.arange(N).expand(2, -1)}
            whole = model(tokens, **given).logits
            cache, parts, start = make(), [], 0
            for n in sizes:
                end = start + n
                given = {} if hidden is None else {"attention_mask": hidden[:, :end]}
                places = torch.arange(start, end).expand(2, -1)
                chunk = tokens[:, start:end]
                parts.append(model(chunk, past_key_values=cache, position_ids=places, **given).logits)
                start = end
        kept = mask.bool() if hidden is not None else torch.ones_like(mask).bool()
        torch.testing.assert_close(torch.cat(parts, dim=1)[kept], whole[kept], **CLOSE)


def test_what_is_not_visible_cannot_move_an_answer(model):
    """Padding, other documents and other rows of the batch."""
    tokens = tokens_of()
    mask = torch.ones_like(tokens)
    mask[0, [0, 1, 7, 33]] = 0
    other = torch.where(mask.bool(), tokens, (tokens + 7) % 50 + 2)
    other[1] = (tokens[1] + 3) % 50 + 2
    with patched(model, layers_for(model)):
        got = [model(t, attention_mask=mask).logits[0, mask[0].bool()] for t in (tokens, other)]
        assert torch.equal(*got)
        future = F.pad(tokens[:, :30], (0, 10), value=3)
        torch.testing.assert_close(model(future).logits[:, :30], model(tokens).logits[:, :30], **CLOSE)
