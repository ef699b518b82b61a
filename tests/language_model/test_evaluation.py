"""Slices of tokens and their counts equal those of slow loops; losses and reads are put beside the right tokens."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny_cram
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from cramlab.language_model import evaluation, ngrams
from cramlab.language_model.evaluation import COUNTS, NATS, evaluate, sliced
from cramlab.language_model.ngrams import repeated, training_counts
from cramlab.language_model.scoring import Scored, score
from cramlab.language_model.text import PreparedText


def stream(n: int, vocab: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))


def text() -> PreparedText:
    return PreparedText(None, stream(5_000).to(torch.uint16), stream(400, seed=1).to(torch.uint16))


def test_repeated_trigrams_are_those_of_a_loop_over_the_window() -> None:
    windows = stream(5 * 40, vocab=4).view(5, 40)
    expected = torch.zeros(5, 39, dtype=torch.bool)
    for i, window in enumerate(windows.tolist()):
        before = set()
        for t in range(2, 40):
            expected[i, t - 1] = tuple(window[t - 2 : t + 1]) in before
            before.add(tuple(window[t - 2 : t + 1]))
    assert torch.equal(repeated(windows), expected)
    assert 0.1 < expected.float().mean() < 0.9


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_counts_are_those_of_a_loop_over_the_training_data(n: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "_CHUNK", chunk)
    train, windows = stream(500).to(torch.uint16), stream(3 * 20, vocab=8, seed=2).view(3, 20)
    tokens = train.tolist()
    counter = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    counts = training_counts(train, windows, n)
    assert counts.shape == (3, 19)
    for i, window in enumerate(windows.tolist()):
        for t in range(1, 20):
            expected = counter[tuple(window[t - n + 1 : t + 1])] if t >= n - 1 else -1
            assert counts[i, t - 1] == expected
    assert (counts == 0).any()


def test_large_token_ids_make_different_trigrams() -> None:
    high = 2**20 - 1
    windows = torch.tensor([[high, 0, 1, high, 0, 2, high, 0, 1]])
    assert repeated(windows).int().tolist() == [[0, 0, 0, 0, 0, 0, 0, 1]]


def test_losses_and_hits_are_those_of_a_call_by_itself_whatever_the_batches() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).train()
    windows = tiny_cram.ids(5, 12)
    scored = score(model, windows, batch_size=2)
    assert model.training  # as before
    assert scored.reads is None
    for i, window in enumerate(windows):
        logits = model.eval()(input_ids=window[None]).logits[0, :-1]
        torch.testing.assert_close(scored.nats[i], F.cross_entropy(logits, window[1:], reduction="none"))
        assert torch.equal(scored.right[i], logits.argmax(-1) == window[1:])


def test_reads_are_those_of_each_layer_at_the_token_that_predicts() -> None:
    torch.manual_seed(0)
    model = tiny_cram.make(router=["always", "benefit"])
    windows = tiny_cram.ids(3, 15)
    seen = []
    hook = model.layers[1].mixer.register_forward_hook(lambda *call: seen.append(call[2].trace.scored))
    scored = score(model, windows, batch_size=3)
    hook.remove()
    assert scored.reads.shape == (3, 14, 2)
    assert scored.reads[..., 0].all()
    assert torch.equal(scored.reads[..., 1], seen[0][:, :-1])
    assert 0 < scored.reads[..., 1].float().mean() < 1
    assert not model.layers[0].mixer._forward_hooks  # a call leaves nothing on the model


def test_bfloat16_is_asked_for_by_autocast() -> None:
    torch.manual_seed(0)
    model, windows = tiny_cram.make(), tiny_cram.ids(2, 15)
    exact, rounded = (score(model, windows, batch_size=2, autocast=autocast).nats for autocast in (False, True))
    assert not torch.equal(exact, rounded)
    assert rounded.dtype == torch.float32
    assert abs(float(exact.mean() - rounded.mean())) < 0.2


def test_slices_hold_the_tokens_that_their_names_say() -> None:
    scored = Scored(
        nats=torch.tensor([[0.05, 3.0, 0.2, 5.0]]),
        right=torch.ones(1, 4, dtype=torch.bool),
        reads=torch.tensor([[[1, 0], [1, 1], [0, 0], [1, 1]]]).bool(),
    )
    is_repeated = torch.tensor([[False, False, True, True]])
    rows = sliced(scored, is_repeated, {"trigram": torch.tensor([[-1, 0, 10, 99]])})
    assert rows["all"]["n"] == 4
    assert rows["repeated"]["nats"] == pytest.approx(2.6)
    assert rows["fresh"]["reads_frac_by_layer"] == [1.0, 0.5]
    assert rows["fresh"]["reads_frac"] == 0.75
    assert rows["nats_by_window"] == pytest.approx([8.25 / 4])
    assert [(row["first"], row["last"], row["n"]) for row in rows["by_position"]] == [(t, t, 1) for t in (1, 2, 3, 4)]
    by_count = {row["count_from"]: row for row in rows["by_count"]["trigram"]}
    assert {low: row["n"] for low, row in by_count.items() if row["n"]} == {0: 1, 8: 1, 64: 1}  # no bin for no trigram
    assert by_count[8]["count_to"] == 15
    assert by_count[8]["nats"] == pytest.approx(0.2)
    assert by_count[1]["nats"] is None
    assert by_count[2**16]["count_to"] is None
    cells = {(row["count_from"], row["nats_from"]): row for row in rows["by_count_and_nats"]["trigram"]}
    assert len(cells) == len(COUNTS) * len(NATS)
    assert {cell: row["n"] for cell, row in cells.items() if row["n"]} == {(0, 2.0): 1, (10, 0.1): 1, (10, 4.0): 1}
    assert cells[10, 4.0]["reads_frac"] == 1.0


def test_hardness_can_be_that_of_another_model() -> None:
    scored = Scored(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), None)
    counts = {"trigram": torch.zeros(1, 3, dtype=torch.int64)}
    rows = sliced(scored, torch.zeros(1, 3, dtype=torch.bool), counts, torch.tensor([[0.0, 1.5, 9.0]]))
    found = {row["nats_from"]: row["n"] for row in rows["by_count_and_nats"]["trigram"] if row["count_from"] == 0}
    assert found == {0.0: 1, 0.1: 0, 0.5: 0, 1.0: 1, 2.0: 0, 4.0: 1}


class Unigram(nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.logits = probabilities.log()

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_model_without_parameters_is_scored_on_the_windows_asked_for() -> None:
    found = evaluate(Unigram(torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])), text(), context=40, n_windows=4)
    targets = text().held_out[:160].long().view(4, 40)[:, 1:]
    expected = torch.where(targets == 0, 0.5, 0.1).log().neg().mean()
    assert found["all"]["nats"] == pytest.approx(float(expected))
    assert (found["part"], found["context"], found["n_windows"]) == ("test", 40, 4)
    assert found["repeated"]["n"] + found["fresh"]["n"] == found["all"]["n"] == 4 * 39
    assert sum(row["n"] for row in found["by_position"]) == 4 * 39
    for name, n_without in (("bigram", 0), ("trigram", 4)):
        assert sum(row["n"] for row in found["by_count"][name]) == 4 * 39 - n_without
        assert sum(row["n"] for row in found["by_count_and_nats"][name]) == 4 * 39 - n_without


def test_a_context_without_a_trigram_is_refused() -> None:
    with pytest.raises(ValueError, match="context = 2"):
        evaluate(Unigram(torch.ones(6)), text(), context=2, n_windows=4)


def test_positions_are_cut_into_as_many_bins_as_promised() -> None:
    found = evaluate(Unigram(torch.ones(6) / 6), text(), context=100, n_windows=4)
    rows = found["by_position"]
    assert len(rows) == evaluation.N_POSITIONS
    assert (rows[0]["first"], rows[-1]["last"]) == (1, 99)
    assert all(a["last"] + 1 == b["first"] for a, b in pairwise(rows))
