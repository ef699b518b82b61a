import pytest
import torch

from cramlab.memory import AdapterConfig, SlotsConfig
from cramlab.memory.consolidation import consolidation_loss, quality

D, N_FACTS = 32, 40


@pytest.mark.parametrize("config", [AdapterConfig(), SlotsConfig()])
@pytest.mark.parametrize("size", [0.3, 4.0])
def test_facts_that_recur_are_remembered_whatever_the_size_of_the_answer(config, size):
    """What the default once failed at: it learned the mean of all answers, and nothing of any one."""
    known, answers = torch.randn(N_FACTS, D), size * torch.randn(N_FACTS, D)
    memory = config.build(D)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=2e-3, weight_decay=0.01)
    shared = 2 * torch.randn(D)  # all queries are alike in most respects
    for _ in range(600):
        which = torch.randint(N_FACTS, (64,))
        strange = torch.rand(64, 1) < 0.3  # and some ask for what never recurs
        h = shared + torch.where(strange, torch.randn(64, D), known[which]) + 0.05 * torch.randn(64, D)
        target = torch.where(strange, size * torch.randn(64, D), answers[which])
        optimizer.zero_grad()
        consolidation_loss(memory(h), target).backward()
        optimizer.step()
    q = quality(memory(shared + known), answers, sigma=1.0)
    stranger = quality(memory(shared + torch.randn(N_FACTS, D)), answers, sigma=1.0)
    assert q.mean() > 0.8
    assert stranger.mean() < 0.5
