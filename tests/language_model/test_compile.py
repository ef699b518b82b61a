"""Blocks of CRAM language models compile in training: whole graphs, few of them, with the numbers of eager blocks."""

import pytest
import torch

from cramlab.language_model.configuration import CRAMForCausalLMConfig
from cramlab.language_model.modeling import CRAMForCausalLM
from cramlab.mixer import Bounds

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute", "ignore:.*should not be instantiated", "ignore:.*torch.jit"
)  # the compiler's own doing
N_TOKENS = 70  # more than a chunk of the delta rule


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(router):
    """A model in training whose reads are bounded, so that no size depends on a gate, by bounds that cut nothing."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "semantic_rank": 8}
    model = CRAMForCausalLM(CRAMForCausalLMConfig(**sizes, num_attention_heads=2, working="delta", router=router))
    own = model._training_routing

    def bounded(routing, gaps):
        routing, without = own(routing, gaps)
        return routing._replace(bounds=Bounds(N_TOKENS, N_TOKENS)), without

    model._training_routing = bounded
    return model.train()


def step(model, tokens, seed, dtype):
    """Loss and gradients; the seed draws audits and the layer that is judged."""
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("router", "dtype", "n_graphs"),
    [
        ("never", torch.bfloat16, 1),
        pytest.param("always", torch.bfloat16, 1, marks=pytest.mark.slow),
        ("benefit", torch.bfloat16, 3),  # below, at and above the layer that is judged
        pytest.param("never", torch.float32, 1, marks=pytest.mark.slow),
        pytest.param("benefit", torch.float32, 3, marks=pytest.mark.slow),
    ],
)
def test_a_graph_serves_every_layer_and_step(router, dtype, n_graphs):
    model = make(router)
    tokens = torch.randint(32, (2, N_TOKENS))
    seeds = range(4)  # either layer is judged
    expected = [step(model, tokens, seed, dtype) for seed in seeds]
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    found = [step(model, tokens, seed, dtype) for seed in seeds]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == n_graphs
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5  # compiled gradients are computed under autocast too
    for (fast, of_fast), (slow, of_slow) in zip(found, expected, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)
        assert of_fast.keys() == of_slow.keys()
        difference = torch.cat([(of_fast[name] - of_slow[name]).flatten() for name in of_slow]).norm()
        assert difference <= limit * torch.cat([g.flatten() for g in of_slow.values()]).norm()
        assert all((of_fast[name] == 0).all() == (of_slow[name] == 0).all() for name in of_slow)
