"""The probes of an audit: their inputs, their sums, and how they are fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cramlab.auditing.capture import Seen
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.regression import GroupMeans, LinearProbe, Moments, ReducedRank, RidgePath
from cramlab.hf.attention_sites import AttentionSite, affine_map

MAIN = "hidden"
PULLS = (0.0, 1.0, 4.0, 16.0, 64.0, 256.0, 1e9)


class Inputs(NamedTuple):
    """Possible inputs of probes, one row per token.

    Attributes:
        hidden: input of attention, after the norm, (N, D).
        stream: residual stream before the norm, (N, D).
        token: group of the token's type: 1 and up for frequent types, 0 for all others, (N,).
        position: position in the context, (N,).
        nothing: zeros, the input of the probe that predicts the mean, (N,).
    """

    hidden: Tensor
    stream: Tensor
    token: Tensor
    position: Tensor
    nothing: Tensor


@dataclass(frozen=True)
class TableProbe:
    """Maps a group to that group's vector; table (G, M)."""

    table: Tensor

    def __call__(self, groups: Tensor) -> Tensor:
        """Returns the vectors of groups (N,), (N, M)."""
        return self.table[groups]


@dataclass(frozen=True, kw_only=True)
class SiteProbe:
    """One probe of one site.

    Attributes:
        sees: name of the field of `Inputs` that is its input.
        heads: predicts the heads' outputs before the output projection, (N, H Dh).
        layer: predicts the sub-layer's output after the projection, (N, D).
    """

    sees: str
    heads: LinearProbe | TableProbe
    layer: LinearProbe | TableProbe

    def answers(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns the predicted outputs of the heads and of the layer."""
        given = getattr(inputs, self.sees)
        return self.heads(given), self.layer(given)


@dataclass(frozen=True, kw_only=True)
class SiteFit:
    """All probes of one site.

    Attributes:
        probes: probes by name; "hidden" is the main one.
        reduced: main probe of the layer's output at every rank.
        strengths: ridge strengths selected on validation, by name of the probe: the layer's, then each head's.
        validation_r2: centred R^2 of the main probe of the layer's output on the validation part.
    """

    probes: Mapping[str, SiteProbe]
    reduced: ReducedRank
    strengths: Mapping[str, tuple[float, ...]]
    validation_r2: float


class Statistics:
    """Sums of one site over one part of the text. Memory: a few D^2, for any number of tokens."""

    def __init__(self, site: AttentionSite, n_types: int, n_positions: int, *, controls: bool = True) -> None:
        d_in, d_out, device = site.d_model, site.d_heads, site.device
        self.hidden = Moments(d_in, d_out, device=device)
        self.answer_square = torch.zeros((), dtype=torch.float64, device=device)
        self.stream = Moments(d_in, d_out, device=device) if controls and site.norm is not None else None
        self.controls = controls
        if controls:
            self.shuffled_xy = torch.zeros(d_in, d_out, dtype=torch.float64, device=device)
            self.shuffled_y = torch.zeros(d_out, dtype=torch.float64, device=device)
            self.earlier = torch.zeros(0, d_out, device=device)
            self.token = GroupMeans(n_types, d_out, device)
            self.position = GroupMeans(n_positions, d_out, device)

    def update(self, seen: Seen, inputs: Inputs, generator: torch.Generator) -> None:
        """Adds a batch. For the shuffled control, its tokens get random outputs of the previous batch.

        Outputs within a document are similar, so that shuffling within it would leave something to predict. Only the
        first batch gets its own outputs.
        """
        heads = seen.heads.double()
        hidden = seen.hidden.double()
        self.hidden.update(hidden, heads)
        self.answer_square += seen.answer.double().square().sum()
        if self.stream is not None:
            self.stream.update(seen.stream, heads)
        if self.controls:
            pool = self.earlier if len(self.earlier) else seen.heads
            drawn = pool[torch.randint(len(pool), (len(heads),), generator=generator).to(pool.device)]
            self.shuffled_xy.addmm_(hidden.T, drawn.double())
            self.shuffled_y += drawn.double().sum(dim=0)
            self.earlier = seen.heads.clone()
            self.token.update(inputs.token, heads)
            self.position.update(inputs.position, heads)

    def _parts(self) -> dict[str, Moments | GroupMeans]:
        parts: dict[str, Moments | GroupMeans] = {"hidden": self.hidden}
        if self.stream is not None:
            parts["stream"] = self.stream
        if self.controls:
            parts |= {"token": self.token, "position": self.position}
        return parts

    def state(self) -> dict[str, Tensor]:
        """Returns the state that `load` restores."""
        own = {"answer_square": self.answer_square}
        if self.controls:
            own |= {"shuffled_xy": self.shuffled_xy, "shuffled_y": self.shuffled_y, "earlier": self.earlier}
        return own | {f"{n}.{k}": v for n, part in self._parts().items() for k, v in part.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores the sums from a `state`."""
        self.answer_square.copy_(state["answer_square"])
        if self.controls:
            self.shuffled_xy.copy_(state["shuffled_xy"])
            self.shuffled_y.copy_(state["shuffled_y"])
            self.earlier = state["earlier"].to(self.earlier.device)
        for name, part in self._parts().items():
            part.load({k: state[f"{name}.{k}"] for k in part.FIELDS})

    def shuffled(self) -> Moments:
        """Returns the sums of `hidden` with the outputs of other tokens."""
        moments = Moments(*self.shuffled_xy.shape, device=self.shuffled_xy.device)
        moments.n, moments.x, moments.y, moments.xx = self.hidden.n, self.hidden.x, self.shuffled_y, self.hidden.xx
        moments.xy = self.shuffled_xy
        return moments


def fit_site(
    site: AttentionSite,
    fit: Statistics,
    validation: Statistics,
    config: AuditConfig,
    other: tuple[Statistics, Statistics] | None = None,
) -> SiteFit:
    """Fits every probe of one site; ridge strengths are selected on validation.

    The output projection is affine, so the sums for the layer's output follow from those for the heads.

    Args:
        site: the site.
        fit: sums of the part for fitting.
        validation: sums of the validation part.
        config: settings, with the strengths to select from.
        other: sums of both parts of another domain, for the probe trained there; None: no such probe.
    """
    projection = affine_map(site)
    pairs = {"hidden": (fit.hidden, validation.hidden), "shuffled": (fit.shuffled(), validation.shuffled())}
    if fit.stream is not None and validation.stream is not None:
        pairs["stream"] = (fit.stream, validation.stream)
    if other is not None:
        pairs["other-domain"] = (other[0].hidden, other[1].hidden)
    probes: dict[str, SiteProbe] = {}
    strengths: dict[str, tuple[float, ...]] = {}
    main: tuple[RidgePath, float, float] | None = None
    for name, (train, held_out) in pairs.items():
        heads_path = RidgePath(train)
        heads, _ = heads_path.choose(held_out, config.strengths, site.n_heads)
        layer_path = heads_path.towards(train.through(*projection))
        layer, excess = layer_path.choose(held_out.through(*projection), config.strengths)
        probes[name] = SiteProbe(
            sees="stream" if name == "stream" else "hidden",
            heads=heads_path.probe(heads).float(),
            layer=layer_path.probe(layer).float(),
        )
        strengths[name] = (*layer, *heads)
        main = main or (layer_path, layer[0], excess[0])
    for name, table in _tables(fit, validation).items():
        layer_table = table @ projection[0] + projection[1]
        sees = "nothing" if name == "mean" else name
        probes[name] = SiteProbe(sees=sees, heads=TableProbe(table.float()), layer=TableProbe(layer_table.float()))
    assert main is not None  # "hidden" is the first pair
    path, strength, excess_of_main = main
    energy = _energy_about(path.y_mean, validation, validation.hidden.through(*projection))
    return SiteFit(
        probes=probes,
        reduced=ReducedRank(path, strength),
        strengths=strengths,
        validation_r2=-excess_of_main / energy if energy > 0 else 0.0,
    )


def _energy_about(mean: Tensor, statistics: Statistics, moments: Moments) -> float:
    """Returns the summed squared distance of a part's outputs from a mean."""
    return float(statistics.answer_square - 2 * mean @ moments.y + moments.n * mean.square().sum())


def _tables(fit: Statistics, validation: Statistics) -> dict[str, Tensor]:
    """Returns predicted heads' outputs for every group: by token type, by position, and the mean alone."""
    tables = {"mean": (fit.hidden.y / fit.hidden.n)[None]}
    for name in ("token", "position"):
        train, held_out = getattr(fit, name), getattr(validation, name)
        tables[name] = train.means(train.choose(held_out, PULLS))
    return tables


def frequent_types(contexts: Sequence[Tensor], n_types: int) -> Tensor:
    """Returns the `n_types` most frequent token ids, sorted; the i-th is group i + 1, all others are group 0."""
    ids, counts = torch.cat([c.flatten() for c in contexts]).unique(return_counts=True)
    return ids[counts.argsort(descending=True, stable=True)[:n_types]].sort().values


def type_groups(tokens: Tensor, types: Tensor) -> Tensor:
    """Returns the groups of tokens (N,), given `frequent_types`."""
    places = torch.searchsorted(types, tokens).clamp(max=len(types) - 1)
    return torch.where(types[places] == tokens, places + 1, 0)


def make_inputs(seen: Seen, tokens: Tensor, types: Tensor) -> Inputs:
    """Returns the inputs of probes for a batch of tokens (B, T)."""
    n_contexts, length = tokens.shape
    flat = tokens.flatten()
    return Inputs(
        hidden=seen.hidden,
        stream=seen.stream,
        token=type_groups(flat, types),
        position=torch.arange(length, device=tokens.device).repeat(n_contexts),
        nothing=torch.zeros_like(flat),
    )
