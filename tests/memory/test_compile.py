"""What torch.compile makes of a CRAM layer: the right answers, in several graphs, or with bounds in a single one."""

import dataclasses

import pytest
import torch

from cramlab.memory import AdapterConfig, CRAMConfig, EpisodicMemoryConfig, RouterConfig, WorkingMemoryConfig
from cramlab.mixer import Bounds, Routing

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute", "ignore:.*should not be instantiated", "ignore:.*torch.jit"
)  # the compiler's own doing
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


@pytest.mark.parametrize("write", [pytest.param("all", marks=pytest.mark.slow), "salience"])
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


def test_without_bounds_one_graph_is_out_of_reach_because_what_is_computed_depends_on_the_data():
    """The gather of the readers is where."""
    compiled = torch.compile(make(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="ata-dependent"):
        compiled(torch.randn(2, 12, D), torch.rand(2, 12))


@pytest.mark.parametrize(
    ("write", "training"),
    [
        ("all", False),
        ("salience", True),
        pytest.param("all", True, marks=pytest.mark.slow),
        pytest.param("salience", False, marks=pytest.mark.slow),
    ],
)
def test_with_bounds_one_graph_holds_the_layer_and_its_gradients(write, training):
    layer = make(write).train(training)
    if layer.episodic.salience is not None:  # else writes are drawn, each time others
        layer.episodic.config = dataclasses.replace(layer.episodic.config, write_audit_frac=0.0)
        layer.config = dataclasses.replace(layer.config, episodic=layer.episodic.config)
    x, gaps = torch.randn(2, 12, D, requires_grad=True), torch.rand(2, 12)
    routing = Routing(bounds=Bounds(reads=6, writes=8), audits=gaps < 0.1)

    def loss(x, gaps):
        output = layer(x, gaps, routing=routing)
        return output.y.square().sum() + sum(output.aux.values()) + output.trace.gate_logit.sum()

    fast, slow = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, gaps), loss(x, gaps)
    assert torch.allclose(fast, slow, atol=1e-4)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, allow_unused=True) for y in (fast, slow)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-4)
