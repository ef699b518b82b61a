"""Parts of a batch add up to the batch; checkpointing changes nothing."""

import pytest
import torch
from families import build
from tiny_cram import ids, make
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from cramlab.memory import CRAMLayer

LENGTHS = (12, 5, 9, 2, 12, 3, 7, 11)


def rows():
    """Texts of different lengths, some of whose tokens are no targets."""
    texts = [ids(1, n)[0] for n in LENGTHS]
    labels = [text.clone() for text in texts]
    labels[2][:6] = -100
    return [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]


def padded(some, *, left=True):
    """A batch, filled up to its own longest text, every other row on the left."""
    length = max(len(row["input_ids"]) for row in some)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for i, row in enumerate(some):
        more = (length - len(row["input_ids"]), 0)[:: 1 if left and i % 2 else -1]
        for name, value, filler in (
            ("input_ids", row["input_ids"], 0),
            ("labels", row["labels"], -100),
            ("attention_mask", torch.ones_like(row["labels"]), 0),
        ):
            batch[name].append(torch.nn.functional.pad(value, more, value=filler))
    return {name: torch.stack(values) for name, values in batch.items()}


def without_chance(**changes):
    """A model in training in which nothing is drawn, and yet every term of the loss is there."""
    model = make(**{"num_hidden_layers": 2, "audit_frac": 0.0} | changes).train()
    for block in model.layers:
        if isinstance(block.mixer, CRAMLayer):
            object.__setattr__(block.mixer.config.episodic, "write_audit_frac", 0.0)
    return model


def loss_and_gradients(model, batches, **how):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, **how).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    {"router": "always"},
    {"router": "never"},
    {"router": "always", "memory_write": "salience"},
    {"router": ["benefit", "always"], "memory_write": "salience"},
    {"router": ["never", "benefit"]},
    {"memory_layers": [0], "memory_write": "salience"},
    {"memory_layers": [1], "router": "always"},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("read_all", [False, True])
def test_parts_of_a_batch_add_up_to_it(changes, read_all):
    """Padded in other ways, and packed; auxiliary terms included."""
    model, data = without_chance(**changes), rows()
    n_items = sum(int((row["labels"][1:] != -100).sum()) for row in data)
    how = {"num_items_in_batch": n_items, "read_all": read_all}
    whole, gradients = loss_and_gradients(model, [padded(data)], **how)
    pack = DataCollatorWithFlattening()
    for batches in (
        [padded(data[i : i + 2]) for i in range(0, 8, 2)],
        [padded(data[:5]), padded(data[5:])],
        [pack(data[:3]), pack(data[3:])],
    ):
        parts, others = loss_and_gradients(model, batches, **how)
        assert parts == pytest.approx(whole, rel=1e-4)
        assert others.keys() == gradients.keys()
        for name, grad in gradients.items():
            torch.testing.assert_close(others[name], grad, atol=1e-5, rtol=1e-3, msg=name)
    halved, _ = loss_and_gradients(
        model, [padded(data)], num_items_in_batch=torch.tensor(2 * n_items), read_all=read_all
    )
    assert halved == pytest.approx(whole / 2, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"router": "always"}, {"router": ["never", "benefit"], "memory_write": "salience"}]
)
def test_trainer_accumulates_as_if_it_were_one_batch(tmp_path, changes):
    data, found = rows(), []
    for size in (4, 2, 1):
        torch.manual_seed(1)
        model = without_chance(**changes)
        arguments = TrainingArguments(
            str(tmp_path / str(size)), max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0, save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, data_collator=lambda some: padded(some, left=False)).train()
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "1" / "checkpoint-2").eval()
    assert torch.equal(again(data[0]["input_ids"][None]).logits, model.eval()(data[0]["input_ids"][None]).logits)
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(found[0]["embed_tokens.weight"], make(**changes).embed_tokens.weight)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("write", ["all", "salience"])
def test_checkpointing_changes_neither_loss_nor_gradients(reentrant, write):
    model = make(memory_write=write, num_hidden_layers=3).train()
    batch, found = padded(rows()), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            assert all(block.gradient_checkpointing for block in model.layers)
        for how in ({}, {"read_all": True}, {"num_items_in_batch": 40}, {"use_cache": True}):
            torch.manual_seed(5)
            found.append(loss_and_gradients(model, [batch], **how))
    for (loss, gradients), (other, others) in zip(found[:4], found[4:], strict=True):
        assert other == loss
        assert others.keys() == gradients.keys()
        for name, grad in gradients.items():
            torch.testing.assert_close(others[name], grad, msg=name)


def test_checkpointing_keeps_blocks_from_holding_what_they_computed():
    model, kept = make().train(), []
    batch = padded(rows())
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        n_bytes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=n_bytes: n.append(t.nbytes) or t, lambda t: t):
            model(**batch).loss.backward()
        kept.append(n_bytes)
    assert sum(kept[1]) < sum(kept[0]) / 2


def test_checkpointing_a_gpt2_with_cram_layers():
    model, tokens, found = build("cram_gpt2").train(), ids(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        found.append(loss_and_gradients(model, [{"input_ids": tokens, "labels": tokens}]))
    (loss, gradients), (other, others) = found
    assert other == loss
    for name, grad in gradients.items():
        torch.testing.assert_close(others[name], grad, msg=name)
