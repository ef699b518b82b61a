import pytest
import torch
from families import build
from tiny_cram import ids, make


def some(**changes):
    return {"input_ids": ids(2, 6), **changes}


LABELS = torch.full((2, 6), -100)
WRONG = {
    "exactly one": {"input_ids": None},
    "exactly one of": {"input_ids": ids(2, 6), "inputs_embeds": torch.zeros(2, 6, 32)},
    "input_ids has type torch.float32": some(input_ids=torch.zeros(2, 6)),
    "input_ids has type torch.bool": some(input_ids=torch.zeros(2, 6, dtype=torch.bool)),
    "input_ids is a list": some(input_ids=[[1, 2]]),
    r"input_ids has shape \(6,\)": some(input_ids=torch.arange(6)),
    "input_ids holds 50": some(input_ids=torch.tensor([[3, 50]])),
    "input_ids holds -1": some(input_ids=torch.tensor([[3, -1]])),
    "inputs_embeds has shape": {"inputs_embeds": torch.zeros(2, 6, 31)},
    "inputs_embeds has type torch.float64": {"inputs_embeds": torch.zeros(2, 6, 32, dtype=torch.float64)},
    "attention_mask has 4 dimensions": some(attention_mask=torch.ones(2, 1, 6, 6)),
    "attention_mask is not a tensor": some(attention_mask={"full": torch.ones(2, 6)}),
    r"attention_mask has shape \(2, 7\)": some(attention_mask=torch.ones(2, 7)),
    "numbers other than 0 and 1": some(attention_mask=torch.full((2, 6), -1e9)),
    "numbers other than 0": some(attention_mask=torch.tensor([[0.0, 0.5, 1, 1, 1, 1]] * 2)),
    "labels has shape": some(labels=ids(2, 5)),
    "labels has type": some(labels=torch.zeros(2, 6)),
    "labels holds 77": some(labels=torch.full((2, 6), 77)),
    "labels holds -1;": some(labels=torch.full((2, 6), -1)),
    "no token to predict": some(labels=LABELS),
    "num_items_in_batch = 0": some(labels=LABELS, num_items_in_batch=0),
    "logits_to_keep = -1": some(logits_to_keep=-1),
    "logits_to_keep asks for token 6 of 6": some(logits_to_keep=torch.tensor([2, 6])),
    "logits_to_keep has shape": some(logits_to_keep=torch.tensor([[2]])),
    "logits_to_keep has type": some(logits_to_keep=torch.tensor([2.0])),
    "output_attentions": some(output_attentions=True),
    "token_type_ids": some(token_type_ids=torch.ones(2, 6)),
    "is_causal": some(is_causal=False),
    "head_mask is unknown": some(head_mask=torch.ones(2)),
    "cache_position": some(cache_position=torch.arange(6)),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_honoured_is_refused_by_name(words):
    with pytest.raises(ValueError, match=words) as refusal:
        make()(**WRONG[words])
    assert "\n" not in str(refusal.value)


def test_what_says_nothing_is_taken():
    model, tokens = make(), ids(2, 6)
    silent = {"token_type_ids": torch.zeros(2, 6), "head_mask": None, "is_causal": True, "output_attentions": False}
    assert torch.equal(model(tokens, **silent).logits, model(tokens).logits)
    assert torch.equal(model(tokens.int()).logits, model(tokens).logits)
    labels = tokens.int()
    assert torch.equal(model(tokens, labels=labels).loss, model(tokens, labels=tokens).loss)


def test_embeddings_in_place_of_tokens():
    model, tokens = make(), ids()
    embedded = model.embed_tokens(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    found = model.generate(inputs_embeds=embedded.detach(), **how)
    assert torch.equal(found, model.generate(tokens, **how)[:, 20:])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs_embeds=embedded.bfloat16()).logits.shape == (3, 20, 50)


def test_a_hole_in_the_mask_is_as_if_the_tokens_were_not_there():
    for model in (make(), make(memory_write="salience")):
        tokens, mask = ids(1, 12), torch.ones(1, 12, dtype=torch.bool)
        mask[0, [0, 4, 5, 11]] = False
        found = model(tokens, attention_mask=mask).logits[mask]
        torch.testing.assert_close(found, model(tokens[mask][None]).logits[0], atol=1e-5, rtol=1e-5)
        nobody = model(tokens, attention_mask=torch.zeros_like(mask)).logits
        assert torch.isfinite(nobody).all()


def test_logits_for_some_tokens_are_those_of_all():
    model, tokens = make(), ids(2, 6)
    whole = model(tokens).logits
    for kept, expected in (
        (torch.tensor([0, 5, -1]), whole[:, [0, 5, -1]]),
        (torch.tensor(2), whole[:, -2:]),
        (torch.tensor([True, False, False, True, False, False]), whole[:, [0, 3]]),
        (9, whole),
    ):
        torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, expected)
        with_loss = model(tokens, labels=tokens, logits_to_keep=kept)
        torch.testing.assert_close(with_loss.logits, expected)
        torch.testing.assert_close(with_loss.loss, model(tokens, labels=tokens).loss)


def test_targets_may_be_given_as_such():
    model, tokens = make(), ids(2, 6)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(tokens, shift_labels=shifted).loss, model(tokens, labels=tokens).loss)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_nothing_out(shape):
    tokens = torch.zeros(shape, dtype=torch.long)
    assert make()(tokens).logits.shape == (*shape, 50)
    with pytest.raises(ValueError, match="no token to predict"):
        make()(tokens, labels=tokens)
    with pytest.raises(ValueError, match="give a token to generate from"):
        make().generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2, pad_token_id=0)


GPT2_WRONG = {
    "has no cache": {"use_cache": True},
    "has no cache;": {"past_key_values": ()},
    "output_attentions": {"output_attentions": True},
    "attention_mask has 4": {"attention_mask": torch.ones(2, 1, 6, 6)},
    "encoder_hidden_states is unknown": {"encoder_hidden_states": torch.zeros(2, 6, 24)},
    "no token to predict": {"labels": LABELS},
    "65 tokens are too many": {"input_ids": torch.zeros(1, 65, dtype=torch.long)},
    "input_ids holds 61": {"input_ids": torch.full((2, 6), 61)},
}


@pytest.mark.parametrize("words", GPT2_WRONG)
def test_a_gpt2_with_cram_layers_refuses_what_it_would_not_listen_to(words):
    with pytest.raises(ValueError, match=words):
        build("cram_gpt2")(**{"input_ids": ids(2, 6), **GPT2_WRONG[words]})


def test_a_gpt2_with_cram_layers_honours_padding_and_generates_without_a_cache():
    model, tokens = build("cram_gpt2"), ids(1, 8)
    plain = model(tokens).logits
    padded, mask = torch.nn.functional.pad(tokens, (3, 2), value=7), torch.nn.functional.pad(tokens * 0 + 1, (3, 2))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=position).logits[:, 3:11]
    torch.testing.assert_close(found, plain)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(tokens, **how)
    by_hand = tokens
    for _ in range(5):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(alone, by_hand)
    together = model.generate(padded[:, :11], attention_mask=mask[:, :11], **how)
    assert torch.equal(together[:, 3:], alone)
    with pytest.raises(ValueError, match="has no cache"):
        model.generate(tokens, cache_implementation="static", **how)
