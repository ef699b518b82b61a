"""Adapters, ranks, gates and sensitivities on planted truth, against obvious reference implementations."""

import torch

from cramlab.auditing.regression import Moments, ReducedRank, RidgePath
from cramlab.consolidation.learn.ridge import choose_ranks, fit_adapter, fit_gate, scaled, sensitivities, unit_scale


def rows(n, seed, noise=0.1):
    """y depends on x through two directions; features differ a hundredfold in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 7, generator=generator, dtype=torch.float64) * torch.tensor([1, 100, 0.01, 1, 1, 1, 1]) + 3
    truth = torch.Generator().manual_seed(99)
    down, up = (torch.randn(shape, generator=truth, dtype=torch.float64) for shape in ((7, 2), (2, 5)))
    y = (x / torch.tensor([1, 100, 0.01, 1, 1, 1, 1])) @ down @ up + 1.5
    return x, y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64)


def moments(x, y):
    sums = Moments(x.shape[1], y.shape[1])
    sums.update(x, y)
    return sums


def test_scaled_sums_are_those_of_scaled_rows():
    x, y = rows(50, 0)
    sums = moments(x, y)
    scale = unit_scale(sums)
    torch.testing.assert_close((x * scale).std(dim=0, correction=0), torch.ones(7, dtype=torch.float64))
    slow = moments(x * scale, y)
    for name in Moments.FIELDS:
        torch.testing.assert_close(getattr(scaled(sums, scale), name), getattr(slow, name))
    assert unit_scale(moments(torch.ones(5, 2), torch.ones(5, 1))).tolist() == [0.0, 0.0]


def test_without_a_rank_the_adapter_is_the_mean():
    fit, held_out = rows(50, 0), rows(50, 1)
    adapter = fit_adapter(moments(*fit), moments(*held_out), [1e-2, 1.0], max_rank=0)
    assert adapter.gains.shape == (0,)
    torch.testing.assert_close(adapter.mean, fit[1].mean(dim=0).to(adapter.mean))


def test_adapter_finds_the_rank_and_its_gains_are_those_of_the_rows():
    fit, held_out = rows(400, 0), rows(300, 1)
    adapter = fit_adapter(moments(*fit), moments(*held_out), [1e-4, 1e-2, 1.0], max_rank=4)
    x, y = held_out
    errors = []
    for rank in range(5):
        down = x @ adapter.down.weight[:, :rank] + adapter.down.bias[:rank]
        errors.append((y - adapter.mean - down @ adapter.up[:rank]).square().sum(dim=1).mean())
    torch.testing.assert_close(torch.stack(errors[:-1]) - torch.stack(errors[1:]), adapter.gains)
    assert errors[2] < 0.02 * errors[0]  # two directions hold everything
    assert adapter.gains[2:].abs().max() < 0.01 * adapter.gains[0]


def test_the_strength_is_the_one_that_other_rows_prefer():
    fit, held_out = rows(12, 0, noise=3.0), rows(300, 1)
    scale = unit_scale(moments(*fit))
    best = {}
    for strength in (1e-4, 1.0, 100.0):
        down, up = ReducedRank(RidgePath(scaled(moments(*fit), scale)), strength).factors(4)
        x, y = held_out[0] * scale, held_out[1]
        answers = [(x @ down.weight[:, :r] + down.bias[:r]) @ up[:r] for r in range(1, 5)]
        best[strength] = min(float((y - fit[1].mean(0) - a).square().sum(1).mean()) for a in answers)
    adapter = fit_adapter(moments(*fit), moments(*held_out), list(best), max_rank=4)
    assert adapter.strength == min(best, key=best.__getitem__)


def test_ranks_go_where_they_gain_most():
    gains = [torch.tensor([4.0, 1.0, 0.5]), torch.tensor([8.0, 7.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0])]
    assert choose_ranks(gains, [1.0, 1.0, 1.0], 10, 1000) == [3, 2, 0]
    assert choose_ranks(gains, [1.0, 1.0, 1.0], 10, 30) == [1, 2, 0]
    assert sum(choose_ranks(gains, [10.0, 1.0, 1.0], 10, 10)) <= 1
    assert choose_ranks(gains, [1.0, 1.0, 1.0], 10, 0) == [0, 0, 0]


def test_gate_is_ridge_regression():
    fit, held_out = rows(400, 0), rows(300, 1)
    probe, strength = fit_gate(moments(fit[0], fit[1][:, :1]), moments(held_out[0], held_out[1][:, :1]), [1e-4, 10.0])
    assert strength == 1e-4
    assert (probe(held_out[0]) - held_out[1][:, :1]).square().mean() < 0.03


def test_sensitivity_is_nats_per_error_pulled_together():
    increase = torch.tensor([0.04, 0.01, -0.02, 0.0], dtype=torch.float64)
    error = torch.tensor([2.0, 1.0, 1.0, 4.0], dtype=torch.float64)
    n = torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    found = sensitivities(increase, error, n, prior_documents=2.0)
    mean = 0.01
    expected = torch.tensor([0.025 / 2, 0.01, 0.1 * mean, mean / 4], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sensitivities(increase, error, n, prior_documents=1e-9)[0], increase[0] / error[0])
