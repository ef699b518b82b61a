"""Copies: MinHash against sets compared one by one."""

import random

import pytest
import torch

from cramlab.auditing import copies
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.copies import SIMILARITY, Originals, shingles_of, similarity
from cramlab.auditing.split import split
from cramlab.errors import AuditError

CONFIG = AuditConfig(context=32, contexts_per_document=2, fit_tokens=1000, validation_tokens=200, test_tokens=400)


def texts(n, length=64, seed=0, vocab=500):
    return list(torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(seed)))


def changed(tokens, n_changes, seed=0):
    found = tokens.clone()
    at = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:n_changes]
    found[at] = 1000 + torch.arange(len(at))
    return found


def runs(tokens):
    """The set of all runs of five."""
    ids = tokens.tolist()
    return {tuple(ids[i : i + 5]) for i in range(max(1, len(ids) - 4))}


def plain(a, b):
    """Jaccard similarity of two sets."""
    return len(a & b) / len(a | b)


def test_similarity_is_that_of_plain_sets():
    base = texts(1, 80)[0]
    for other in [*(changed(base, n) for n in (0, 1, 3, 8, 40)), base[10:], base[:4], texts(1, 80, seed=1)[0]]:
        assert similarity(shingles_of(base), shingles_of(other)) == pytest.approx(plain(runs(base), runs(other)))
    assert similarity(shingles_of(base[:3]), shingles_of(base[:3])) == 1


@pytest.mark.parametrize("length", [24, 100])
def test_what_is_taken_is_what_a_comparison_of_all_pairs_takes(length):
    """Documents with 0 to 30% of their tokens changed, in random order."""
    some = texts(15, length)
    found = [
        changed(one, round(share * length), i) for i, one in enumerate(some) for share in (0, 0.02, 0.05, 0.1, 0.3)
    ]
    random.Random(0).shuffle(found)
    originals, taken = Originals(), []
    for document in found:
        held = runs(document)
        alike = max((plain(held, one) for one in taken), default=0.0)
        if originals.knows(document) != (alike >= SIMILARITY):
            assert SIMILARITY <= alike < 0.6  # MinHash may miss a pair, and only one that is barely alike
        if originals.take(document):
            taken.append(held)
    assert originals.n_copies == len(found) - len(taken) > 30
    assert 15 <= len(taken) < 45


def test_the_outcome_is_the_same_each_time():
    found = [changed(one, n, n) for one in texts(20) for n in (0, 4, 7)]

    def taken():
        originals = Originals()
        return [originals.take(document) for document in found]

    assert taken() == taken()


def test_a_document_is_a_copy_if_one_of_its_contexts_is():
    originals = Originals()
    a, b, c = texts(3)
    assert originals.take(a, b)
    assert not originals.take(c, changed(b, 2))
    assert originals.take(c)
    assert originals.n_copies == 1


def test_an_audit_uses_a_document_once():
    found = texts(60)
    copied = [*found, *(changed(one, 2, i) for i, one in enumerate(found)), *found]
    parts = split(copied, CONFIG, n_features=10)
    used = [contexts.document % 60 for part in (parts.fit, parts.validation, parts.test) for contexts in part]
    assert len(used) == len(set(used))
    assert parts.n_copies > 0
    assert [len(part) for part in (parts.test, parts.validation, parts.fit)] == [7, 4, 16]


def test_text_without_copies_is_split_as_if_nobody_had_looked(monkeypatch):
    found = texts(40)
    parts = split(found, CONFIG, n_features=10)
    monkeypatch.setattr(copies.Originals, "take", lambda *_: True)
    for ours, theirs in ((part, getattr(split(found, CONFIG, n_features=10), name)) for name, part in (
        ("fit", parts.fit), ("validation", parts.validation), ("test", parts.test))):  # fmt: skip
        assert [one.document for one in ours] == [one.document for one in theirs]
    assert parts.n_copies == 0


def test_too_few_that_differ_are_refused_with_the_number_of_copies():
    with pytest.raises(AuditError, match=r"2 documents \(98 further ones are copies\) are too few"):
        split([*texts(2)] * 50, CONFIG, n_features=10)


def test_the_other_text_holds_no_copy_of_what_is_tested():
    found = texts(60)
    parts = split(found, CONFIG, n_features=10)
    tested = {contexts.document for contexts in parts.test}
    elsewhere = split(found, CONFIG, n_features=10, apart_from=parts.test)
    assert not tested & {c.document for part in (elsewhere.fit, elsewhere.validation, elsewhere.test) for c in part}
    assert elsewhere.n_copies == len(tested)


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(AuditError, match=r'pip install "cramlab\[hf\]"'):
        Originals()
