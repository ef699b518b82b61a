"""A CRAM layer on its own: one pass, then the same tokens one by one with a bounded buffer."""

import torch

from cramlab import CRAMConfig
from cramlab.memory import EpisodicMemoryConfig

torch.manual_seed(0)
layer = CRAMConfig(episodic=EpisodicMemoryConfig(capacity=16)).build(d_model=128).eval()
x = torch.randn(2, 40, 128)  # (batch, tokens, width)
gaps = torch.rand(2, 40)  # time since the previous event

with torch.no_grad():
    whole = layer(x, gaps)
    state, steps = None, []
    for t in range(40):
        output = layer(x[:, t : t + 1], gaps[:, t : t + 1], state)
        state = output.state
        steps.append(output.y)

print(f"share of tokens that read: {whole.trace.scored.float().mean():.2f}")
print(f"largest difference of steps to one pass: {(torch.cat(steps, dim=1) - whole.y).abs().max():.1e}")
print(f"entries in the buffer: {state.buffer.n_places}")
