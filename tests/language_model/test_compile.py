"""CRAM language models compile for training: whole graphs, few of them, with the numbers of eager models."""

import pytest
import torch
from torch._functorch import config as functorch

from cramlab.language_model.compilation import compile_for_training
from cramlab.language_model.configuration import CRAMForCausalLMConfig
from cramlab.language_model.modeling import CRAMForCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute", "ignore:.*should not be instantiated", "ignore:.*torch.jit"
)  # the compiler's own doing
N_TOKENS = 70  # more than a chunk of the delta rule


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    settings = {name: getattr(functorch, name) for name in ("backward_pass_autocast",) if hasattr(functorch, name)}
    with functorch.patch(settings):  # which compile_for_training changes
        yield
    torch._dynamo.reset()


def make(router):
    """A model in training."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "semantic_rank": 8}
    how = {"num_attention_heads": 2, "working": "delta", "gate_learns": "nats", "judged_frac": 0.7}
    model = CRAMForCausalLM(CRAMForCausalLMConfig(**sizes, **how, router=router))
    return model.train()


def step(model, tokens, seed, dtype, *, read_all=False):
    """Loss and gradients; the seed draws audits and the layer that is judged, if any."""
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=tokens, labels=tokens, read_all=read_all).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("router", "dtype", "n_graphs"),
    [
        ("never", torch.bfloat16, 2),  # of the blocks and of the loss
        pytest.param("always", torch.bfloat16, 2, marks=pytest.mark.slow),
        ("benefit", torch.bfloat16, 4),  # two of each: with a judged layer and without
        pytest.param("never", torch.float32, 2, marks=pytest.mark.slow),
        pytest.param("benefit", torch.float32, 4, marks=pytest.mark.slow),
    ],
)
def test_a_graph_serves_every_layer_and_step(router, dtype, n_graphs):
    model = make(router)
    names, judged = model.state_dict().keys(), []
    tokens = torch.randint(32, (2, N_TOKENS))
    seeds = range(4)
    draw = model._training_routing
    model._training_routing = lambda routing, gaps: judged.append((found := draw(routing, gaps))[1]) or found
    expected = [step(model, tokens, seed, dtype) for seed in seeds]
    assert router != "benefit" or set(judged) == {-1, 0, 1}  # none is judged, the first, or the last
    compile_for_training(model, "aot_eager")
    assert model.state_dict().keys() == names
    torch._dynamo.utils.counters.clear()
    found = [step(model, tokens, seed, dtype) for seed in seeds]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == n_graphs
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for (fast, of_fast), (slow, of_slow) in zip(found, expected, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)
        assert of_fast.keys() == of_slow.keys()
        difference = torch.cat([(of_fast[name] - of_slow[name]).flatten() for name in of_slow]).norm()
        assert difference <= limit * torch.cat([g.flatten() for g in of_slow.values()]).norm()
        assert all((of_fast[name] == 0).all() == (of_slow[name] == 0).all() for name in of_slow)
