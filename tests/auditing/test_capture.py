import pytest
import torch
from families import BUILD, build, documents
from torch import nn

from cramlab.auditing.capture import hooked, watching
from cramlab.errors import AuditError
from cramlab.hf.attention_sites import attention_sites, base_model
from cramlab.hf.loading import reading_all


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", BUILD)
def test_watching_leaves_outputs_bit_equal_and_no_hook_behind(name):
    model, tokens = build(name), torch.stack(documents(2, 12))
    with torch.no_grad(), reading_all(model):
        before, n_hooks = model(tokens).logits, hooks_of(model)
        seen = []
        with watching(attention_sites(model), lambda i, _: seen.append(i)):
            assert torch.equal(model(tokens).logits, before)
        assert len(seen) == 3
        assert hooks_of(model) == n_hooks
        model(tokens)
        assert len(seen) == 3


def test_hooks_are_removed_after_an_error_of_the_model_of_the_caller_and_of_registering():
    model, tokens = build("llama"), torch.stack(documents(1, 8))

    def fail(i, _):
        if i == 1:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), torch.no_grad(), watching(attention_sites(model), fail):
        model(tokens)
    assert hooks_of(model) == 0

    layer = nn.Linear(2, 2)

    def handles():
        yield layer.register_forward_hook(lambda *_: None)
        raise RuntimeError("while registering")

    with pytest.raises(RuntimeError, match="while registering"), hooked(handles):
        raise AssertionError("never entered")
    assert hooks_of(layer) == 0


def test_nan_names_the_layer():
    model, tokens = build("gpt2"), torch.stack(documents(1, 8))
    sites = attention_sites(model)
    with torch.no_grad():
        sites[1].out_proj.bias[0] = float("nan")
        with (
            pytest.raises(AuditError, match="layer 1: the output of attention holds NaN"),
            watching(sites, lambda *_: 0),
        ):
            base_model(model)(input_ids=tokens)
    assert hooks_of(model) == 0


def test_answers_for_some_tokens_only_are_refused():
    model, tokens = build("cram_gpt2"), torch.stack(documents(1, 8))
    with torch.no_grad(), pytest.raises(AuditError, match="some of the tokens only"), \
         watching(attention_sites(model), lambda *_: 0):  # fmt: skip
        model(tokens)
