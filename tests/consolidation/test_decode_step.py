"""A decode step that decides on the device gives what the patched model gives, and reads no value on the host."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from kernels import DEVICE
from patches import EVERYTHING, NOTHING, at, layers_for, model_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from cramlab.consolidation.patch import Counts, closed, install, installed
from cramlab.consolidation.rules.baselines import WindowOnly
from cramlab.consolidation.serving import DecodeStep
from cramlab.errors import ConsolidationError

N_PROMPT, N_STEPS, CAPACITY = 13, 9, 30
PADDING = (4, 0, 9)  # of three sequences; the last has no far keys at first
ON_HOST = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "item", "equal"}


def prompts():
    ids = torch.randint(1, 60, (3, N_PROMPT + N_STEPS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, n in zip(mask, PADDING, strict=True):
        row[:n] = 0
    return ids.to(DEVICE), mask.to(DEVICE)


def pieces():
    return [(0, N_PROMPT), *((i, i + 1) for i in range(N_PROMPT, N_PROMPT + N_STEPS))]


@torch.no_grad()
def by_patched(model, ids, mask):
    """Logits after the prompt and each further token by the model itself, (steps, B, V), and counts of the steps."""
    cache, positions, found = DynamicCache(config=model.config), (mask.cumsum(1) - 1).clamp(min=0), []
    for begin, end in pieces():
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        output = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, **given)
        found.append(output.logits[:, -1])
        if begin == 0:
            for layer in installed(model).values():
                layer.tally.reset()
    return torch.stack(found), [layer.counts for layer in installed(model).values()]


def by_step(step, ids, mask):
    """The same by a step."""
    (_, n), *steps = pieces()
    return torch.stack([step.prefill(ids[:, :n], mask[:, :n]), *(step(ids[:, i:j]) for i, j in steps)])


def example(name, threshold=0.0):
    model = model_of(name).to(DEVICE)
    install(model, at(layers_for(model), threshold))
    return model, DecodeStep(model, n_batch=3, capacity=CAPACITY)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_step_equals_patched_model_with_its_decisions(name):
    model, step = example(name)
    expected, counts = by_patched(model, *prompts())
    assert torch.allclose(by_step(step, *prompts()), expected, atol=2e-4)
    reads, far = 0, 0
    for by_device, by_host in zip(step.counts().values(), counts, strict=True):
        assert by_device.tokens == 3 * N_STEPS
        assert by_device.far_tokens == by_host.far_tokens
        assert by_device.far_reads == by_host.far_reads
        reads, far = reads + by_device.far_reads, far + by_device.far_tokens
    assert 0 < reads < far


def test_open_gates_give_the_original_and_shut_gates_the_window():
    """Both through thresholds that are changed in place."""
    model, step = example("llama")
    ids, mask = prompts()
    with closed(model):
        original, _ = by_patched(model, ids, mask)
        found = step.prefill(ids[:, :N_PROMPT], mask[:, :N_PROMPT])
    assert torch.allclose(found, original[0], atol=1e-5)
    step.thresholds.fill_(-torch.inf)
    for (begin, end), expected in zip(pieces()[1:], original[1:], strict=True):
        assert torch.allclose(step(ids[:, begin:end]), expected, atol=1e-4)
    shut = model_of("llama").to(DEVICE)
    install(shut, at(layers_for(shut), NOTHING))
    step = DecodeStep(shut, n_batch=3, capacity=CAPACITY)
    assert (step.thresholds == torch.inf).all()
    assert torch.allclose(by_step(step, ids, mask), by_patched(shut, ids, mask)[0], atol=2e-4)
    counts = Counts()
    for one in step.counts().values():
        counts += one
    assert counts.far_reads == counts.far_pairs == 0
    assert counts.skipped_frac == 1


def test_pairs_are_counted_by_sequence():
    _, step = example("llama", EVERYTHING)
    ids, mask = prompts()
    by_step(step, ids, mask)
    n_keys = torch.tensor([[N_PROMPT - n + t + 1 for n in PADDING] for t in range(N_STEPS)])
    for counts in step.counts().values():
        assert counts.causal_pairs == n_keys.sum()
        assert counts.window_pairs == n_keys.clamp(max=8).sum()
        assert counts.far_pairs == (n_keys - 8).clamp(min=0).sum()
        assert counts.pairs_frac == 1


class NothingOnHost(TorchDispatchMode):
    """Refuses operators that read a value, or whose shapes depend on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ON_HOST:
            raise AssertionError(f"{function} reads a value on the host")
        return function(*args, **(kwargs or {}))


def test_step_reads_no_value_on_the_host():
    model, step = example("llama")
    ids, mask = prompts()
    step.prefill(ids[:, :N_PROMPT], mask[:, :N_PROMPT])
    with NothingOnHost():
        step(ids[:, -1:])
        with pytest.raises(AssertionError, match="on the host"):  # as the patched model does
            by_patched(model, ids, mask)


def test_step_is_one_graph_for_a_compiler():
    _, step = example("llama")
    ids, mask = prompts()
    expected = by_step(step, ids, mask)
    counts = step.counts()
    step.counted.zero_()
    step.prefill(ids[:, :N_PROMPT], mask[:, :N_PROMPT])
    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for (begin, end), wanted in zip(pieces()[1:], expected[1:], strict=True):
        assert torch.allclose(compiled(ids[:, begin:end]), wanted, atol=1e-5)
    assert step.counts() == counts


def test_weights_are_shared_and_the_patched_model_stays_as_it_is():
    model, step = example("llama")
    ids, mask = prompts()
    before, attended = by_patched(model, ids, mask)[0], model.config._attn_implementation
    by_step(step, ids, mask)
    assert model.config._attn_implementation == attended
    assert torch.equal(by_patched(model, ids, mask)[0], before)
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for n, p in step.model.named_parameters() if "cramlab" not in n)
    assert not installed(step.model)


def test_a_step_continues_greedily_as_the_patched_model():
    model, step = example("llama")
    ids, mask = (given[:, :N_PROMPT] for given in prompts())
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=N_STEPS, do_sample=False, pad_token_id=0
    )
    for _ in range(2):  # a second prompt into the same cache
        assert torch.equal(step.generate(ids, mask, n_tokens=N_STEPS), expected[:, N_PROMPT:])
        assert step.length == N_PROMPT + N_STEPS - 1


def test_what_a_step_cannot_do_is_refused():
    model = model_of("llama").to(DEVICE)
    with pytest.raises(ConsolidationError, match="not patched"):
        DecodeStep(model, n_batch=1, capacity=8)
    windowed = copy.deepcopy(model)
    install(windowed, {1: WindowOnly(window=4, n_sinks=1)})
    with pytest.raises(ConsolidationError, match="WindowOnly decides on the host"):
        DecodeStep(windowed, n_batch=1, capacity=8)
    install(model, layers_for(model))
    with pytest.raises(ConsolidationError, match="n_batch = 0 must be"):
        DecodeStep(model, n_batch=0, capacity=8)
    step = DecodeStep(model, n_batch=1, capacity=8)
    ids = torch.ones(1, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ConsolidationError, match=r"shape \(2, 4\); give 1 sequences"):
        step.prefill(ids.repeat(2, 1))
    with pytest.raises(ConsolidationError, match="pad prompts on the left"):
        step.prefill(ids, torch.tensor([[1, 1, 1, 0]]))
    with pytest.raises(ConsolidationError, match="does not fit into a cache of 8"):
        step.generate(ids, n_tokens=6)
    with pytest.raises(ConsolidationError, match="call the step, not its model"):
        step.model(ids)
    if DEVICE == "cpu":
        with pytest.raises(ConsolidationError, match="cannot be recorded on cpu"):
            step.recorded()


def test_layers_without_a_gate_read_everything():
    model = model_of("llama").to(DEVICE)
    layers = at(layers_for(model), NOTHING)
    install(model, {1: layers[1]})
    step = DecodeStep(model, n_batch=3, capacity=CAPACITY)
    assert torch.allclose(by_step(step, *prompts()), by_patched(model, *prompts())[0], atol=2e-4)
    assert list(step.counts()) == [1]


@pytest.mark.skipif(DEVICE != "cuda", reason="wants CUDA")
@pytest.mark.parametrize("how", ["recorded", "compiled"])
def test_graphs_on_a_card_give_what_the_step_gives(how):
    _, step = example("qwen3")  # its heads are wide enough for the kernels
    ids, mask = prompts()
    expected = by_step(step, ids, mask)
    counts = step.counts()
    step.counted.zero_()
    step.prefill(ids[:, :N_PROMPT], mask[:, :N_PROMPT])
    again = step.recorded() if how == "recorded" else torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for (begin, end), wanted in zip(pieces()[1:], expected[1:], strict=True):
        assert torch.allclose(again(ids[:, begin:end]), wanted, atol=1e-4)
    assert step.counts() == counts
    step.thresholds.fill_(torch.inf)  # a recording asks for the thresholds of now
    step.length -= 1
    shut = again(ids[:, -1:]).clone()
    assert not torch.allclose(shut, expected[-1], atol=1e-4)


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    exec(code, {})
    shape, skipped = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([3, 5])"
    assert set(ast.literal_eval(skipped)) == {0, 1}
