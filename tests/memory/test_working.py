import pytest
import torch

from cramlab.memory.working import WorkingMemory, WorkingMemoryConfig
from cramlab.ops.scan import naive


@pytest.mark.parametrize("refine_steps", [0, 1, 3])
def test_chunks_with_carried_state_equal_one_pass(refine_steps):
    memory = WorkingMemory(WorkingMemoryConfig(d_state=16, n_timescales=4, refine_steps=refine_steps), 8)
    x, gaps = torch.randn(3, 37, 8), torch.rand(3, 37)
    whole, _, end = memory(x, gaps, memory.initial_state(3))
    state, parts = memory.initial_state(3), []
    for chunk in (slice(0, 1), slice(1, 20), slice(20, 37)):
        y, _, state = memory(x[:, chunk], gaps[:, chunk], state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
    assert torch.allclose(state, end, atol=1e-5)


def test_without_refinement_it_is_the_linear_memory():
    memory = WorkingMemory(WorkingMemoryConfig(d_state=16, n_timescales=4, refine_steps=0), 8)
    x, gaps = torch.randn(1, 5, 8), torch.rand(1, 5)
    y, _, _ = memory(x, gaps, memory.initial_state(1))
    u = memory.write(x).unflatten(-1, (4, 4))
    s = naive.decay_scan(u, gaps, memory.log_rate.exp(), memory.initial_state(1))
    assert torch.allclose(y, memory.w_out(memory.norm(s.flatten(2))) + x, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"d_state": 10, "n_timescales": 4}, "d_state"), ({"longest": 0.5}, "longest"), ({"refine_steps": -1}, "refine")],
)
def test_bad_sizes_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        WorkingMemoryConfig(**changes)
