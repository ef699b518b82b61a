import pytest
import torch

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.split import count_tokens, cut, split
from cramlab.errors import AuditError

CONFIG = AuditConfig(context=8, contexts_per_document=2, fit_tokens=100, validation_tokens=20, test_tokens=40)


def lengths(*ns):
    return [torch.arange(n) + 100 * i for i, n in enumerate(ns)]


def test_documents_are_cut_into_whole_contexts():
    found = cut(lengths(7, 8, 17, 90), CONFIG)
    assert [(c.document, tuple(c.tokens.shape)) for c in found] == [(1, (1, 8)), (2, (2, 8)), (3, (2, 8))]
    assert found[1].tokens.flatten().tolist() == list(range(200, 216))
    assert [tuple(b.shape) for b in found[1].batches(8)] == [(1, 8), (1, 8)]
    assert [tuple(b.shape) for b in found[1].batches(4)] == [(1, 8), (1, 8)]
    assert [tuple(b.shape) for b in found[1].batches(999)] == [(2, 8)]


def test_parts_share_no_document_and_depend_on_the_seed_alone():
    texts = lengths(*[20] * 30)
    parts = split(texts, CONFIG, n_features=10)
    names = [{c.document for c in part} for part in (parts.fit, parts.validation, parts.test)]
    assert sum(map(len, names)) == len(set.union(*names))
    assert [count_tokens(p) for p in (parts.fit, parts.validation, parts.test)] == [112, 32, 48]
    again = split(texts, CONFIG, n_features=10)
    assert [c.document for c in again.fit] == [c.document for c in parts.fit]
    other = split(texts, AuditConfig(**vars(CONFIG) | {"seed": 1}), n_features=10)
    assert [c.document for c in other.fit] != [c.document for c in parts.fit]


def test_too_little_text_is_refused_with_the_reason():
    with pytest.raises(AuditError, match="shorter than a context: the longest has 7 tokens"):
        split(lengths(7, 3), CONFIG, 5)
    with pytest.raises(AuditError, match="2 documents are too few"):
        split(lengths(20, 20), CONFIG, 5)
    with pytest.raises(AuditError, match=r"112 tokens for fitting, fewer tokens than features .200"):
        split(lengths(*[20] * 30), CONFIG, 200)


def test_scarce_text_is_shared_out():
    parts = split(lengths(*[16] * 8), AuditConfig(context=8), n_features=5)
    assert [len(p) for p in (parts.fit, parts.validation, parts.test)] == [5, 1, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [("context", 3), ("fit_tokens", 0), ("seed", -1), ("strengths", ()), ("strengths", (0.0,)),
     ("replaced_fracs", (1.0,)), ("replaced_fracs", ()), ("strengths", (0.5, float("nan"))),
     ("confidence", 1.0), ("layers", ()), ("layers", (-1,))],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"audit\.{field} = "):
        AuditConfig(**{field: value})
