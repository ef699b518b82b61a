import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cramlab.memory import DeltaMemoryConfig, WorkingLayerConfig, WorkingMemoryConfig

D = 16
WORKING = [WorkingMemoryConfig(d_state=8, n_timescales=4), DeltaMemoryConfig(n_heads=2, d_head=8)]


@pytest.mark.parametrize("working", WORKING)
def test_it_answers_as_its_working_memory_and_passes_over_padding(working):
    layer, x, gaps = WorkingLayerConfig(working=working).build(D), torch.randn(2, 20, D), torch.rand(2, 20)
    output = layer(x, gaps)
    y, _, state = layer.working(x, gaps, layer.working.initial_state(2))
    assert torch.equal(output.y, y)
    assert torch.equal(output.state.working, state)
    assert not output.trace.attended.any()
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, 3:7] = False
    state, parts = None, []
    for t in range(20):
        step = layer(x[:, t : t + 1], gaps[:, t : t + 1], state, valid=valid[:, t : t + 1])
        state = step.state
        parts.append(step.y)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, layer(x, gaps, valid=valid).y)
    torch.testing.assert_close(found[:1, valid[0]], layer(x[:1, valid[0]], gaps[:1, valid[0]]).y)
    assert not found[0, 3:7].any()


def test_its_cost_is_what_it_computes_and_holds():
    layer = WorkingLayerConfig(working=WORKING[0]).build(D)
    with FlopCounterMode(display=False) as counter:
        state = layer(torch.randn(1, 30, D), torch.rand(1, 30)).state
    cost = layer.cost(30)
    assert cost.flops == counter.get_total_flops()
    assert cost.state_bytes == state.working.numel() * 4
    assert not state.buffer.n_places
    assert (cost.reads, cost.read_flops) == (0, 0)
    assert cost.parameter_bytes == 4 * sum(p.numel() for p in layer.parameters())


def test_a_state_of_another_layer_is_refused():
    layer = WorkingLayerConfig().build(D)
    with pytest.raises(ValueError, match="give the CRAMState"):
        layer(torch.randn(1, 2, D), torch.ones(1, 2), state=torch.zeros(1))
