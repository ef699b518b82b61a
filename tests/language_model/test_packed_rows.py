import pytest
import torch
from families import build
from tiny_cram import ids, make
from transformers import DataCollatorWithFlattening, DynamicCache

from cramlab.language_model.packed_rows import Packing, documents

LENGTHS = (12, 1, 14, 5)
STARTS = torch.tensor([0, 12, 13, 27])


def texts():
    return [ids(1, n)[0] for n in LENGTHS]


def collated(rows, **how):
    """Documents packed as transformers packs them, with everything that it can say about it."""
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, **how)(
        [{"input_ids": row} for row in rows]
    )


@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("router", ["benefit", "always"])
def test_packed_logits_losses_and_gradients_are_those_of_each_document_alone(write, router):
    model, rows = make(memory_write=write, router=router), texts()
    batch = collated(rows)
    packed = model(**batch)
    alone = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(packed.logits[0], alone)
    n_targets = sum(LENGTHS) - len(LENGTHS)
    losses = [model(row[None], labels=row[None], num_items_in_batch=n_targets).loss for row in rows if len(row) > 1]
    torch.testing.assert_close(packed.loss, torch.stack(losses).sum())
    found = torch.autograd.grad(packed.loss, list(model.parameters()), allow_unused=True)
    expected = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()), allow_unused=True)
    assert any(grad is not None and grad.any() for grad in found)
    for grad, other in zip(found, expected, strict=True):
        if grad is not None and other is not None:
            torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)
        assert all(one is None or not one.any() for one in (grad, other)) or (grad is not None and other is not None)


def test_every_way_to_say_where_documents_begin_says_the_same():
    model, rows = make(), texts()
    batch = collated(rows)
    whole, tokens = model(**batch).logits, batch["input_ids"]
    names = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
    for name in names:
        torch.testing.assert_close(model(tokens, **{name: batch[name]}).logits, whole)
    assert not torch.allclose(model(tokens).logits, whole, atol=1e-3)
    later = collated(rows, position_ids_start=2)["position_ids"]
    torch.testing.assert_close(model(tokens, position_ids=later).logits, whole)
    with_labels = model(tokens, position_ids=batch["position_ids"], labels=tokens).loss
    torch.testing.assert_close(with_labels, model(**batch).loss)  # a first token is nobody's target, whatever its label
    hidden = model(**batch, output_hidden_states=True, logits_to_keep=torch.tensor([3, -1]))
    assert hidden.hidden_states[1].shape == (1, sum(LENGTHS), 32)
    torch.testing.assert_close(hidden.logits, whole[:, [3, -1]])


def test_packed_rows_of_a_batch_with_padding_between_and_after():
    model, rows = make(memory_write="salience"), texts()
    pad = torch.zeros(3, dtype=torch.long)
    tokens = torch.stack([torch.cat([rows[0], pad, rows[2]]), torch.cat([rows[2], rows[0], pad])])
    number = torch.cat([torch.zeros(15), torch.ones(14)]).long(), torch.cat([torch.zeros(14), torch.ones(15)]).long()
    valid = torch.ones(2, 29, dtype=torch.long)
    valid[0, 12:15] = valid[1, 26:] = 0
    logits = model(tokens, attention_mask=valid, seq_idx=torch.stack(number)).logits
    first, second = (model(rows[i][None]).logits[0] for i in (0, 2))
    torch.testing.assert_close(logits[0][valid[0] == 1], torch.cat([first, second]))
    torch.testing.assert_close(logits[1][valid[1] == 1], torch.cat([second, first]))


def test_training_a_packed_row_is_training_the_documents_as_a_batch():
    """All terms of the loss; audits are drawn for the same tokens by reading everywhere."""
    model, rows = make(memory_write="salience", num_hidden_layers=1, audit_frac=0.0), texts()
    model.train()
    length = max(LENGTHS)
    padded = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])
    mask = (torch.arange(length) < torch.tensor(LENGTHS)[:, None]).long()
    labels = padded.masked_fill(mask == 0, -100)
    for n_items in (None, 100):
        packed = model(**collated(rows), num_items_in_batch=n_items, read_all=True).loss
        batch = model(padded, attention_mask=mask, labels=labels, num_items_in_batch=n_items, read_all=True).loss
        torch.testing.assert_close(packed, batch)


def test_position_ids_that_pack_nothing_change_nothing():
    model, tokens = make(), ids()
    plain = model(tokens).logits
    for position in (torch.arange(20), torch.arange(20)[None], torch.arange(7, 27).expand(3, 20)):
        assert torch.equal(model(tokens, position_ids=position).logits, plain)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, 6:9] = 0
    masked = model(tokens, attention_mask=mask).logits
    for position in ((mask.cumsum(1) - 1).clamp(min=0), torch.arange(20)[None]):  # with padding counted, or not
        assert torch.equal(model(tokens, attention_mask=mask, position_ids=position).logits, masked)


CONTRADICTIONS = {
    "neither follows": {"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9]])},
    "position_ids has shape": {"position_ids": torch.arange(7)[None]},
    "position_ids must be a tensor of integers": {"position_ids": torch.arange(8.0)[None]},
    "seq_idx falls": {"seq_idx": torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0]])},
    "cu_seq_lens_q must rise": {"cu_seq_lens_q": torch.tensor([0, 3, 7])},
    "cu_seq_lens_k must rise": {"cu_seq_lens_k": torch.tensor([0, 5, 3, 8])},
    "max_length_q = 4": {"cu_seq_lens_q": torch.tensor([0, 3, 8]), "max_length_q": 4},
    "max_length_k is given without": {"max_length_k": 4},
    "position_ids and seq_idx": {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]),
    },
    "cu_seq_lens_q and cu_seq_lens_k": {
        "cu_seq_lens_q": torch.tensor([0, 3, 8]), "cu_seq_lens_k": torch.tensor([0, 4, 8]),
    },
    "use_cache": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "use_cache": True},
    "past_key_values": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "past_key_values": DynamicCache()},
}  # fmt: skip


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_what_cannot_be_meant_is_refused_by_name(words):
    with pytest.raises(ValueError, match=words):
        make()(ids(1, 8), **CONTRADICTIONS[words])


def test_a_row_that_goes_on_from_a_cache_cannot_begin_anew():
    model, tokens = make(), ids(2, 12)
    cache = model(tokens[:, :8], use_cache=True).past_key_values
    whole = model(tokens).logits
    for position, words in ((torch.arange(4), "restart"), (torch.arange(9, 13), "ends at 8")):
        with pytest.raises(ValueError, match=words):
            model(tokens[:, 8:], past_key_values=cache, position_ids=position[None])
    with pytest.raises(ValueError, match="restart"):
        model(tokens[:, 8:9], past_key_values=cache, position_ids=torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="cannot continue"):
        model(tokens[:, 8:], past_key_values=cache, seq_idx=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="single row"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 12]))
    goes_on = model(tokens[:, 8:], past_key_values=cache, position_ids=torch.arange(8, 12)[None]).logits
    torch.testing.assert_close(goes_on, whole[:, 8:], atol=1e-4, rtol=1e-4)


def test_the_way_there_and_back():
    found = documents(Packing(seq_idx=torch.tensor([[0, 0, 1], [4, 4, 4]])), (2, 3))
    assert found.there.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    entries = torch.randn(2, 3, 5)
    assert torch.equal(found.together(found.apart(entries)), entries)
    assert found.ends.tolist() == [[False, True, False], [False, False, False]]
    assert documents(Packing(seq_idx=torch.tensor([[3, 3, 3]])), (1, 3)) is None


def test_packed_rows_of_a_gpt2_with_cram_layers():
    model, rows = build("cram_gpt2"), texts()
    batch = collated(rows)
    with torch.no_grad():
        packed = model(**batch)
        alone = [model(row[None]).logits[0] for row in rows]
        torch.testing.assert_close(packed.logits[0], torch.cat(alone))
        nats = [
            torch.nn.functional.cross_entropy(y[:-1], row[1:], reduction="sum")
            for y, row in zip(alone, rows, strict=True)
        ]
        torch.testing.assert_close(packed.loss, sum(nats) / (sum(LENGTHS) - len(LENGTHS)))
        with pytest.raises(ValueError, match="need position_ids"):
            model(batch["input_ids"], seq_idx=batch["seq_idx"])
