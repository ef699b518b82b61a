"""A bounded layer with all kernels equals the same layer without. On a CPU only in Triton's interpreter."""

import kernels
import pytest
import torch
from kernels import DEVICE

from cramlab.memory import AdapterConfig, CRAMConfig, EpisodicMemoryConfig
from cramlab.mixer import Bounds, Routing
from cramlab.ops import dispatch
from cramlab.ops.select import fused

pytestmark = [kernels.wanted, kernels.protest]
D, N_TOKENS = 32, 40


def results(layer, x, gaps, state, routing, weight):
    """Everything that a call returns, and the gradients of its losses."""
    x = x.clone().requires_grad_()
    output = layer(x, gaps, state, routing=routing)
    loss = (output.y * weight).sum() + sum(output.aux.values()) + output.trace.gate_logit.square().mean()
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
    assert 0 < output.trace.scored.float().mean() < 1
    trace = (output.trace.scored, output.trace.path, output.trace.quality)
    return output.state, [output.y, *trace, *output.aux.values(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("n_batch", [1, 3])
def test_outputs_and_gradients_are_the_same(write, capacity, n_batch, monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 16)
    memory = EpisodicMemoryConfig(n_heads=2, capacity=capacity, write=write, write_audit_frac=0.0)
    layer = CRAMConfig(episodic=memory, semantic=AdapterConfig(rank=12)).build(D).to(DEVICE).train()
    x = torch.randn(n_batch, N_TOKENS, D, device=DEVICE)
    gaps, weight = torch.rand(n_batch, N_TOKENS, device=DEVICE), torch.randn_like(x)
    with torch.no_grad():  # gates that let half of the tokens pass, none of them at the threshold
        h = layer.norm(layer.working(x, gaps, layer.working.initial_state(n_batch))[0])
        layer.gate.out.bias -= layer.gate(h, layer.semantic.recognise(h)).quantile(0.5) / layer.gate.gain
        if layer.episodic.salience is not None:
            layer.episodic.salience.out.bias -= layer.episodic.salience(h).quantile(0.5)
    routing = Routing(audits=torch.rand_like(gaps) < 0.1, bounds=Bounds(reads=15, writes=N_TOKENS))
    states = [None, None]
    for _ in range(2):  # the second time with the buffer that the first has left
        found = []
        for i, with_kernels in enumerate((True, False)):
            monkeypatch.setattr(dispatch, "usable", lambda _, on=with_kernels: on)
            state, numbers = results(layer, x, gaps, states[i], routing, weight)
            states[i] = type(state)(state.working.detach(), type(state.buffer)(*(t.detach() for t in state.buffer)))
            found.append(numbers)
        for fast, slow in zip(*found, strict=True):
            assert torch.allclose(fast.double(), slow.double(), atol=5e-5, rtol=1e-3, equal_nan=True)
