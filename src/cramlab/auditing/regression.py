"""Linear regression from streamed sums: ridge for every strength, reduced rank for every rank.

Source: textbook ridge and reduced-rank regression (Izenman 1975); the streamed form is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Sums over rows (x, y) from which the regression of y on x follows exactly; float64, memory D^2 + D M.

    Attributes:
        n: number of rows.
        x: sum of x, (D,).
        y: sum of y, (M,).
        xx: sum of outer products of x with itself, (D, D).
        xy: sum of outer products of x and y, (D, M).
    """

    FIELDS = ("n", "x", "y", "xx", "xy")

    def __init__(self, d_in: int, d_out: int, *, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n, self.x, self.y = zeros(), zeros(d_in), zeros(d_out)
        self.xx, self.xy = zeros(d_in, d_in), zeros(d_in, d_out)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds rows x (N, D) and y (N, M)."""
        x, y = x.double(), y.double()
        self.n += len(x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def state(self) -> dict[str, Tensor]:
        """Returns the state that `load` restores."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores the sums from a `state`."""
        for name in self.FIELDS:
            getattr(self, name).copy_(state[name])

    def through(self, weight: Tensor, bias: Tensor) -> Moments:
        """Returns the sums for y @ weight + bias in place of y; weight (M, K), bias (K,)."""
        mapped = Moments(len(self.x), weight.shape[1], device=self.x.device)
        mapped.n, mapped.x, mapped.xx = self.n, self.x, self.xx
        mapped.y = self.y @ weight + self.n * bias
        mapped.xy = self.xy @ weight + torch.outer(self.x, bias)
        return mapped

    def about(self, x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `xx` and `xy` of the rows after subtracting the given means."""
        cross = torch.outer(self.x, x_mean)
        xx = self.xx - cross - cross.T + self.n * torch.outer(x_mean, x_mean)
        xy = self.xy - torch.outer(self.x, y_mean) - torch.outer(x_mean, self.y) + self.n * torch.outer(x_mean, y_mean)
        return xx, xy


@dataclass(frozen=True)
class LinearProbe:
    """The map `y = x @ weight + bias`; weight (D, M), bias (M,)."""

    weight: Tensor
    bias: Tensor

    def float(self) -> LinearProbe:
        """Returns the probe in float32."""
        return LinearProbe(self.weight.float(), self.bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        """Maps x (..., D) to y (..., M)."""
        return x @ self.weight + self.bias


class RidgePath:
    """Ridge regression with an unpenalised bias, for every strength from one eigendecomposition.

    Minimises `|y - x w - b|^2 + alpha |w|^2` with `alpha = strength * trace(S) / D`, where S is the centred sum of
    outer products of x, so that a strength does not depend on scale and number of tokens.
    """

    def __init__(self, moments: Moments) -> None:
        self.x_mean, self.y_mean = moments.x / moments.n, moments.y / moments.n
        xx, self.xy = moments.about(self.x_mean, self.y_mean)
        values, self._basis = torch.linalg.eigh(xx)
        self._values = values.clamp(min=0)
        self._scale = self._values.mean().clamp(min=torch.finfo(torch.float64).tiny)
        self._rotated = self._basis.T @ self.xy

    def towards(self, moments: Moments) -> RidgePath:
        """Returns the path for another y over the same rows of x, sharing the eigendecomposition."""
        path = copy.copy(self)
        path.y_mean = moments.y / moments.n
        _, path.xy = moments.about(self.x_mean, path.y_mean)
        path._rotated = path._basis.T @ path.xy
        return path

    def alpha(self, strength: float) -> float:
        """Returns the penalty on the squared weights."""
        return float(strength * self._scale)

    def _solution(self, strength: float) -> Tensor:
        """Returns the weight in the basis of eigenvectors."""
        return self._rotated / (self._values + self.alpha(strength))[:, None]

    def probe(self, strengths: Sequence[float]) -> LinearProbe:
        """Returns the solution for one strength, or for one strength per equal group of columns of y."""
        groups = self.xy.shape[1] // len(strengths)
        columns = []
        for i, strength in enumerate(strengths):
            columns.append(self._solution(strength)[:, i * groups : (i + 1) * groups])
        weight = self._basis @ torch.cat(columns, dim=1)
        return LinearProbe(weight, self.y_mean - self.x_mean @ weight)

    def choose(
        self, held_out: Moments, strengths: Sequence[float], n_groups: int = 1
    ) -> tuple[list[float], list[float]]:
        """Selects the strength with the lowest squared error on other rows, for each of `n_groups` groups of columns.

        Returns:
            The strengths, and the squared error of each minus that of predicting the mean of the fitted rows.
        """
        xx, xy = held_out.about(self.x_mean, self.y_mean)
        xx, xy = self._basis.T @ xx @ self._basis, self._basis.T @ xy
        excess = []
        for strength in strengths:
            w = self._solution(strength)
            excess.append((w * (xx @ w) - 2 * w * xy).sum(dim=0).view(n_groups, -1).sum(dim=1))
        least, chosen = torch.stack(excess).min(dim=0)
        return [strengths[i] for i in chosen.tolist()], least.tolist()


class ReducedRank:
    """Reduced-rank ridge regression for every rank from one decomposition.

    Among all weights of rank r, `B V_r V_r^T` minimises the ridge objective, where B is the full-rank solution, V_r
    holds the r leading eigenvectors of `B^T (S + alpha) B = B^T C`, and C is the centred sum of x y^T.

    Attributes:
        directions: V, (M, M), columns from the largest to the smallest eigenvalue.
        coordinates: full-rank probe in these directions: prediction minus mean of y, times V.
        y_mean: mean of y over the fitted rows, (M,).
    """

    def __init__(self, path: RidgePath, strength: float) -> None:
        full = path.probe([strength])
        gram = full.weight.T @ path.xy
        _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        self.directions = vectors.flip(1)
        self.y_mean = path.y_mean
        weight = full.weight @ self.directions
        self.coordinates = LinearProbe(weight, -path.x_mean @ weight)

    def factors(self, rank: int) -> tuple[LinearProbe, Tensor]:
        """Returns the map from x to `rank` numbers, and the matrix (rank, M) from these to y minus its mean."""
        down = LinearProbe(self.coordinates.weight[:, :rank], self.coordinates.bias[:rank])
        return down, self.directions[:, :rank].T

    def probe(self, rank: int) -> LinearProbe:
        """Returns the probe of this rank as one matrix."""
        down, up = self.factors(rank)
        return LinearProbe(down.weight @ up, down.bias @ up + self.y_mean)


def squared_errors_by_rank(coordinates: Tensor, residual: Tensor, ranks: Sequence[int]) -> Tensor:
    """Returns the squared error of each row at each rank, (N, R).

    Args:
        coordinates: outputs of `ReducedRank.coordinates`, (N, M).
        residual: y minus `y_mean`, in the same directions, (N, M).
        ranks: the ranks; 0 is the mean alone.
    """
    gained = (coordinates * (coordinates - 2 * residual)).cumsum(dim=1)
    gained = torch.cat([torch.zeros_like(gained[:, :1]), gained], dim=1)
    return residual.square().sum(dim=1, keepdim=True) + gained[:, list(ranks)]


class GroupMeans:
    """Means of y by group, shrunk towards the overall mean: the best prediction from the group alone.

    Attributes:
        n: number of rows in each group, (G,).
        y: sum of y of each group, (G, M).
    """

    FIELDS = ("n", "y")

    def __init__(self, n_groups: int, d_out: int, device: torch.device | None = None) -> None:
        self.n = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self.y = torch.zeros(n_groups, d_out, dtype=torch.float64, device=device)

    def update(self, groups: Tensor, y: Tensor) -> None:
        """Adds rows y (N, M) with their groups (N,)."""
        self.n.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        self.y.index_add_(0, groups, y.double())

    def state(self) -> dict[str, Tensor]:
        """Returns the state that `load` restores."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores the sums from a `state`."""
        for name in self.FIELDS:
            getattr(self, name).copy_(state[name])

    def means(self, pull: float) -> Tensor:
        """Returns (G, M): each group's mean over its rows and `pull` further rows at the overall mean."""
        overall = self.y.sum(dim=0) / self.n.sum()
        return (self.y + pull * overall) / (self.n + pull).clamp(min=1e-9)[:, None]

    def choose(self, held_out: GroupMeans, pulls: Sequence[float]) -> float:
        """Returns the pull with the lowest squared error on other rows."""
        errors = []
        for pull in pulls:
            means = self.means(pull)
            errors.append(float((held_out.n[:, None] * means.square() - 2 * means * held_out.y).sum()))
        return pulls[errors.index(min(errors))]
