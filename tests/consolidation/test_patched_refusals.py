"""What a patched model refuses, in one line, where it would give other numbers in silence; rules that say nonsense."""

import pytest
import torch
from families import documents
from patches import N_SINKS, WINDOW, layers_for, model_of
from peft import LoraConfig, get_peft_model

from cramlab.consolidation.patch.calls import _stacks
from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.consolidation.patch.install import closed, install, installed, patched, remove
from cramlab.errors import ConsolidationError

N = 40
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def tokens_of():
    return torch.stack(documents(2, N))


def test_an_output_projection_that_was_replaced_is_refused():
    """peft's `merge_and_unload` takes the module away that the patch was put at."""
    model, tokens = model_of("llama"), tokens_of()
    changed = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    with pytest.raises(ConsolidationError, match="wraps a model"):
        install(changed, layers_for(model))
    layers = layers_for(model)
    install(model, layers)
    with torch.no_grad():
        wanted = changed(tokens).logits
        merged = changed.merge_and_unload()
        with pytest.raises(ConsolidationError, match="projection was replaced"):
            merged(tokens)
        assert not _stacks.calls
        remove(merged)
        with patched(merged, layers):
            torch.testing.assert_close(merged(tokens).logits, wanted, **CLOSE)


class Wrong(FarReads):
    """A rule whose decision has a wrong shape or type."""

    def __init__(self, reads, answer=None):
        super().__init__(window=WINDOW, n_sinks=N_SINKS)
        self.decision = reads, answer

    def decide(self, seen):
        return self.decision


def test_decisions_of_a_wrong_shape_or_type_are_refused():
    model, yes = model_of("llama"), torch.ones(2, N, dtype=torch.bool)
    for decision, message in (
        ((yes[0],), r"Wrong\.decide returned reads of shape \(40,\)"),
        ((yes.long(),), r"torch\.int64"),
        ((yes[..., None].expand(-1, -1, 2),), r"\(2, 40, 3\)"),
        ((yes, torch.zeros(2, 24)), r"an answer of shape \(2, 24\)"),
    ):
        with patched(model, {1: Wrong(*decision)}), pytest.raises(ConsolidationError, match=message):
            model(tokens_of())


def test_a_mixture_by_heads_of_zeros_and_ones_is_the_choice_of_heads():
    model, tokens = model_of("llama"), tokens_of()
    reads = torch.rand(2, N, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    answer = torch.randn(2, N, 24, generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad():
        for chosen in (reads, reads.float()):
            with patched(model, {1: Wrong(chosen, answer)}):
                found.append(model(tokens).logits)
    torch.testing.assert_close(*found, **CLOSE)


def test_what_would_be_answered_in_silence_is_refused():
    """Weights of attention that was skipped, a trace of one text's reads, layers that were made to see later tokens."""
    model = model_of("llama")
    install(model, layers_for(model))
    with pytest.warns(DeprecationWarning, match="jit"), pytest.raises(ConsolidationError, match="trace"):
        torch.jit.trace(lambda x: model(x, use_cache=False).logits, tokens_of(), check_trace=False)
    remove(model)
    model.set_attn_implementation("eager")
    with patched(model, layers_for(model)):
        with pytest.raises(ConsolidationError, match="no attention weights"):
            model(tokens_of(), output_attentions=True)
        with closed(model):
            assert len(model(tokens_of(), output_attentions=True).attentions) == 3
        vars(model.get_submodule("model.layers.1.self_attn"))["is_causal"] = False
        with pytest.raises(ConsolidationError, match="must be causal"):
            model(tokens_of())


def test_what_an_interrupt_leaves_on_the_stacks_goes_with_the_next_call():
    model = model_of("llama")
    install(model, layers_for(model))

    def interrupt(*_):
        raise KeyboardInterrupt  # after which torch runs no hooks

    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens_of())
    handle.remove()
    assert _stacks.calls
    model(tokens_of())
    assert (_stacks.calls, _stacks.passes) == ([], [])


def test_the_patch_is_taken_off_through_what_is_wrapped_around_the_model():
    model = model_of("llama")
    install(model, layers_for(model))
    remove(torch.nn.DataParallel(model))
    assert not installed(model)
    assert model.config._attn_implementation == "sdpa"
