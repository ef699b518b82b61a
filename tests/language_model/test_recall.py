"""Tests of recall: a model that looks up the longest match is always right, one that guesses is not."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_cram
import torch
from torch import nn

from cramlab.language_model.corpus import write_corpus
from cramlab.language_model.recall import ANSWER_TOKENS, copying, frequent_tokens, lookup, needle, recall
from cramlab.language_model.text import PreparedText, open_corpus

TOKENS = torch.arange(5, 45)
VOCAB = 280


class Matching(nn.Module):
    """Predicts the token after the earlier place whose last tokens match the present ones longest, by a slow loop."""

    def __init__(self, vocab_size: int = 50, farthest: int = 10**6) -> None:
        super().__init__()
        self.vocab_size, self.farthest = vocab_size, farthest

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(len(row)):
                best = max(range(max(0, t - self.farthest), t), key=lambda j: self._match(row, j, t), default=None)
                if best is not None and self._match(row, best, t):
                    logits[b, t, row[best + 1]] = 50.0
        return SimpleNamespace(logits=logits)

    def _match(self, row: list[int], j: int, t: int) -> int:
        n = 0
        while n <= j and row[j - n] == row[t - n]:
            n += 1
        return n


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> PreparedText:
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "a = b", "x == y", "\n"]
    documents = [(f"d{i}", f"{i} " + " ".join(draw.choices(words, k=80))) for i in range(60)]
    folder: Path = tmp_path_factory.mktemp("corpora") / "words"
    write_corpus(folder, documents, vocab_size=VOCAB)
    return open_corpus(folder)


def test_a_model_that_matches_copies_and_looks_up_without_error() -> None:
    copied = copying(Matching(), TOKENS, n_tokens=12, n_sequences=6)
    assert copied["accuracy"] == 1.0
    assert copied["nats"] < 1e-6
    assert copied["nats_first"] == pytest.approx(torch.tensor(50.0).log().item())
    assert copied["n_sequences"] == 6
    found = lookup(Matching(), TOKENS, n_pairs=8, n_sequences=20)
    assert (found["accuracy"], found["chance"]) == (1.0, 1 / 8)


def test_a_model_that_sees_too_few_tokens_fails_where_the_answer_is_farther() -> None:
    assert copying(Matching(farthest=11), TOKENS, n_tokens=12, n_sequences=6)["accuracy"] < 0.1
    assert copying(Matching(farthest=12), TOKENS, n_tokens=12, n_sequences=6)["accuracy"] == 1.0
    near = lookup(Matching(farthest=8), TOKENS, n_pairs=8, n_sequences=200)["accuracy"]
    assert 0.35 < near < 0.65  # half of the pairs are that near


def test_a_secret_in_text_is_given_back_by_a_model_that_matches(text: PreparedText) -> None:
    tokens = torch.arange(5, 200)
    found = needle(Matching(VOCAB), text, tokens, context=80, secret="\nSECRET =", n_sequences=3)
    assert (found["accuracy"], found["accuracy_by_token"], found["n_sequences"]) == (1.0, 1.0, 3)
    near = needle(Matching(VOCAB, farthest=30), text, tokens, context=80, secret="\nSECRET =", n_sequences=3)
    assert near["accuracy"] == 0.0


def test_an_answer_is_right_only_if_all_its_tokens_are(text: PreparedText) -> None:
    class Forgetful(Matching):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            logits = super().forward(input_ids).logits
            logits[:, -2] = 0.0  # the answer's last token is predicted here
            return SimpleNamespace(logits=logits)

    tokens = torch.arange(5, 200)
    found = needle(Forgetful(VOCAB), text, tokens, context=80, secret="\nSECRET =", n_sequences=3)
    assert found["accuracy"] == 0.0
    assert found["accuracy_by_token"] == 1 - 1 / ANSWER_TOKENS


def test_sequences_follow_from_the_seed() -> None:
    seen = []

    class Noting(Matching):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            seen.append(input_ids)
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    for seed in (0, 0, 1):
        copying(Noting(), TOKENS, n_tokens=12, n_sequences=4, seed=seed)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert all(len(set(row.tolist())) == 12 for row in seen[0])


def test_reads_are_reported_where_the_answer_is_asked_for() -> None:
    torch.manual_seed(0)
    found = copying(tiny_cram.make(router=["always", "never"]), TOKENS, n_tokens=8, n_sequences=4)
    assert found["reads_frac"] == 0.5


def test_frequent_tokens_are_in_order_and_hold_no_mark(text: PreparedText) -> None:
    counts = torch.bincount(text.train.long(), minlength=VOCAB)
    begin = text.files.about["begin_token"]
    found = frequent_tokens(text, n=10, skip=2).tolist()
    expected = sorted((t for t in range(VOCAB) if t != begin), key=lambda t: -counts[t])[2:12]
    assert counts[found].tolist() == counts[expected].tolist()
    assert begin not in frequent_tokens(text, n=20, skip=0)
    with pytest.raises(ValueError, match="different tokens"):
        frequent_tokens(text, n=1000)


def test_all_tests_of_recall_run_at_the_sizes_that_fit(text: PreparedText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cramlab.language_model.recall.frequent_tokens", lambda _text: torch.arange(5, 45))
    found = recall(Matching(VOCAB), text, context=80, n_sequences=2)
    assert [row["n_tokens"] for row in found["copying"]] == [16]
    assert [row["n_pairs"] for row in found["lookup"]] == [4, 16]
    assert [row["context"] for row in found["needle"]] == [40, 80]


def test_too_little_room_or_text_without_a_tokenizer_is_refused(text: PreparedText) -> None:
    with pytest.raises(ValueError, match="context = 20 is too short"):
        needle(Matching(VOCAB), text, TOKENS, context=20)
    bare = PreparedText(None, text.train, text.held_out)
    with pytest.raises(ValueError, match="has none"):
        needle(Matching(VOCAB), bare, TOKENS, context=80)
    with pytest.raises(ValueError, match="different tokens are needed"):
        copying(Matching(), TOKENS, n_tokens=50)
