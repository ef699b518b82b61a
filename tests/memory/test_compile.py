"""What torch.compile makes of a CRAM layer: the right answers in several graphs, never a single one."""

import pytest
import torch

from cramlab.memory import AdapterConfig, CRAMConfig, EpisodicMemoryConfig, RouterConfig, WorkingMemoryConfig

D = 16


def make(write="all"):
    config = CRAMConfig(
        working=WorkingMemoryConfig(d_state=8, n_timescales=4),
        episodic=EpisodicMemoryConfig(n_heads=2, capacity=6, write=write),
        semantic=AdapterConfig(rank=8),
        router=RouterConfig(d_hidden=8),
    )
    layer = config.build(D).eval()
    torch.nn.init.zeros_(layer.gate.out.bias)
    return layer


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute", "ignore:.*should not be instantiated", "ignore:.*torch.jit"
)  # the compiler's own doing
@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # graph capture, where a routed layer could break, without the C++ compiler
        pytest.param("inductor", marks=pytest.mark.slow),  # the default, with it
    ],
)
def test_compiled_answers_and_gradients_are_the_same(write, backend):
    layer = make(write)
    compiled = torch.compile(layer, backend=backend)
    x, gaps = torch.randn(2, 12, D, requires_grad=True), torch.rand(2, 12)
    weight = torch.randn(2, 12, D)
    fast, slow = ((way(x, gaps).y * weight).sum() for way in (compiled, layer))
    assert torch.allclose(fast, slow, atol=1e-4)
    assert torch.allclose(*(torch.autograd.grad(y, x)[0] for y in (fast, slow)), atol=1e-4)


def test_one_graph_is_out_of_reach_because_what_is_computed_depends_on_the_data():
    """The check of the gaps is the first of several such places; the gather of the readers is the essential one."""
    compiled = torch.compile(make(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        compiled(torch.randn(2, 12, D), torch.rand(2, 12))
