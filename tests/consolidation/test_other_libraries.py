"""A consolidated model in the hands of pipeline, Trainer, accelerate and peft."""

import pytest
import torch
from accelerate import Accelerator
from consolidated import examples, make
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

import cramlab
from cramlab.consolidation.folder import RECORD, WEIGHTS
from cramlab.consolidation.patch.install import installed
from cramlab.hf.loading import load

pytest.importorskip("glassllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("consolidated")
    make(out)
    return out


@pytest.fixture
def model(folder):
    return cramlab.load_consolidated("glassllm", folder)


@pytest.fixture
def tokens():
    return examples(load("glassllm"))[0][1]


def tokenizer(size):
    """A tokenizer of words t0, t1, ..., one for each id."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0")


def test_a_pipeline_generates_what_the_model_does(model, tokens):
    words = tokenizer(model.config.vocab_size)
    text = " ".join(f"t{i}" for i in tokens[:40].tolist())
    how = {"max_new_tokens": 5, "do_sample": False}
    made = pipeline("text-generation", model=model, tokenizer=words)(text, return_full_text=False, **how)
    expected = model.generate(tokens[None, :40], pad_token_id=0, **how)[0, 40:]
    assert made[0]["generated_text"].split() == [f"t{i}" for i in expected.tolist()]
    counts = cramlab.skip_counts(model)
    assert counts.live
    assert 0 < counts.total.far_reads < counts.total.far_tokens


@pytest.mark.filterwarnings("ignore")  # what Trainer and the saved patch say
def test_a_trainer_trains_the_backbone_and_its_checkpoint_holds_both(model, tokens, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(tmp_path, max_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True,
                                  per_device_train_batch_size=1, save_steps=1, disable_tqdm=True)  # fmt: skip
    rows = [{"input_ids": tokens, "labels": tokens}]
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("consolidated" in name for name in changed)  # gates and adapters are frozen
    assert {RECORD, WEIGHTS} <= {path.name for path in (tmp_path / "checkpoint-1").iterdir()}


@torch.no_grad()
def test_accelerate_prepares_it(model, tokens):
    expected = model(tokens[None]).logits
    prepared = Accelerator(cpu=True).prepare(model)
    assert torch.equal(prepared(tokens[None]).logits, expected)
    assert cramlab.skip_counts(prepared).live


def test_lora_learns_around_it_and_comes_off(model, tokens):
    expected = model(tokens[None]).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    loss = adapted(tokens[None], labels=tokens[None]).loss
    loss.backward()
    learned = [p for p in adapted.parameters() if p.requires_grad]
    assert learned
    assert all(p.grad is not None and p.grad.any() for p in learned)
    assert len(installed(adapted)) == 4
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(adapted(tokens[None]).logits, expected)


def test_lm_eval_takes_it_as_a_pretrained_model(model, tokens):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    wrapped = lm_eval.HFLM(pretrained=model, tokenizer=tokenizer(model.config.vocab_size), batch_size=1)
    with torch.no_grad():
        assert torch.equal(wrapped._model_call(tokens[None]), model(tokens[None]).logits)
