import pytest
import torch
from sklearn.linear_model import Ridge

from cramlab.auditing.regression import GroupMeans, Moments, ReducedRank, RidgePath, squared_errors_by_rank


def data(n=90, d=7, m=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, d) + 2
    y = (
        x @ torch.randn(d, m, generator=g, dtype=torch.float64)
        + torch.randn(n, m, generator=g, dtype=torch.float64)
        - 1
    )
    return x, y


def moments(x, y, chunk=13):
    found = Moments(x.shape[1], y.shape[1])
    for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
        found.update(a, b)
    return found


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 30.0])
def test_streamed_ridge_is_scikit_learns(strength):
    x, y = data()
    path = RidgePath(moments(x, y))
    reference = Ridge(alpha=path.alpha(strength)).fit(x.numpy(), y.numpy())
    probe = path.probe([strength])
    torch.testing.assert_close(probe.weight, torch.from_numpy(reference.coef_.T))
    torch.testing.assert_close(probe.bias, torch.from_numpy(reference.intercept_))


def test_each_group_of_columns_has_its_own_strength():
    x, y = data()
    path = RidgePath(moments(x, y))
    both = path.probe([1e-3, 1.0])
    torch.testing.assert_close(both.weight[:, :3], path.probe([1e-3]).weight[:, :3])
    torch.testing.assert_close(both.bias[3:], path.probe([1.0]).bias[3:])


def test_float32_rows_are_summed_in_float64():
    x, y = data()
    found = moments(x.float(), y.float())
    torch.testing.assert_close(found.xx, x.float().double().T @ x.float().double(), rtol=1e-14, atol=0)


def test_the_strength_is_the_one_with_least_error_on_the_other_rows():
    x, y = data(n=12)  # few rows: the strength matters
    other_x, other_y = data(n=400, seed=0)
    other_x, other_y = other_x[50:], other_y[50:]
    strengths = (1e-6, 1e-3, 1e-1, 1.0, 10.0)
    path = RidgePath(moments(x, y))
    chosen, excess = path.choose(moments(other_x, other_y), strengths, n_groups=2)
    for group, columns in enumerate((slice(0, 3), slice(3, 6))):
        errors = [float((path.probe([s])(other_x) - other_y)[:, columns].square().sum()) for s in strengths]
        of_mean = float((y.mean(dim=0) - other_y)[:, columns].square().sum())
        assert chosen[group] == strengths[errors.index(min(errors))]
        assert excess[group] == pytest.approx(min(errors) - of_mean)


def test_an_affine_map_of_the_answers_maps_the_sums():
    x, y = data()
    weight, bias = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mapped, direct = moments(x, y).through(weight, bias), moments(x, y @ weight + bias)
    for name in Moments.FIELDS:
        torch.testing.assert_close(getattr(mapped, name), getattr(direct, name))
    path = RidgePath(moments(x, y))
    torch.testing.assert_close(path.towards(direct).probe([0.1]).weight, RidgePath(direct).probe([0.1]).weight)


def test_a_state_is_taken_back():
    x, y = data()
    whole, part, rest = moments(x, y), moments(x[:26], y[:26]), Moments(7, 6)
    rest.load(part.state())
    for a, b in zip(x[26:].split(13), y[26:].split(13), strict=True):
        rest.update(a, b)
    assert all(torch.equal(getattr(whole, name), getattr(rest, name)) for name in Moments.FIELDS)


def test_every_rank_is_the_best_of_its_rank():
    """Against the textbook: ordinary least squares projected on the leading directions of the fitted values."""
    x, y = data()
    path = RidgePath(moments(x, y))
    reduced = ReducedRank(path, 1e-9)
    xc, yc = x - x.mean(dim=0), y - y.mean(dim=0)
    ols = torch.linalg.lstsq(xc, yc).solution
    _, _, directions = torch.linalg.svd(xc @ ols, full_matrices=False)
    errors = squared_errors_by_rank(reduced.coordinates(x), yc @ reduced.directions, range(7)).sum(dim=0)
    for rank in range(7):
        v = directions[:rank].T
        expected = xc @ ols @ v @ v.T + y.mean(dim=0)
        torch.testing.assert_close(reduced.probe(rank)(x), expected, rtol=1e-5, atol=1e-5)
        assert float(errors[rank]) == pytest.approx(float((expected - y).square().sum()), rel=1e-5)
        down, up = reduced.factors(rank)
        assert down.weight.shape == (7, rank)
        assert up.shape == (rank, 6)
    assert (errors.diff() < 0).all()


def test_a_planted_rank_is_found():
    x, _ = data(n=2000)
    y = x[:, :1] @ torch.randn(1, 6, dtype=torch.float64) + x[:, 3:4] @ torch.randn(1, 6, dtype=torch.float64)
    reduced = ReducedRank(RidgePath(moments(x, y, 100)), 1e-9)
    errors = squared_errors_by_rank(reduced.coordinates(x), (y - reduced.y_mean) @ reduced.directions, [0, 1, 2, 6])
    relative = (errors.sum(dim=0) / errors[:, 0].sum()).tolist()
    assert relative[1] > 0.01 > 1e-9 > relative[2]


def test_group_means_are_pulled_towards_the_mean():
    groups, y = torch.tensor([0, 0, 1, 2]), torch.tensor([[1.0], [3.0], [10.0], [-6.0]])
    found = GroupMeans(4, 1)
    found.update(groups, y)
    overall = 2.0
    expected = [(4 + 5 * overall) / 7, (10 + 5 * overall) / 6, (-6 + 5 * overall) / 6, overall]
    assert found.means(5.0)[:, 0].tolist() == pytest.approx(expected)
    assert found.choose(found, (0.0, 4.0, 1e9)) == 0.0
    far = GroupMeans(4, 1)
    far.update(groups, 2 * overall - y)  # the other way round: better to know nothing of groups
    assert found.choose(far, (0.0, 4.0, 1e9)) == 1e9
