"""Computes all figures of an audit, with their intervals, from the sums that its stages gathered."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cramlab import records
from cramlab.auditing.bootstrap import Bootstrap, Estimates
from cramlab.auditing.causal import CausalSums
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.probes import MAIN, SiteFit
from cramlab.auditing.redundancy import CLASSES, N_BINS, Example, Tally
from cramlab.auditing.replacement import KINDS
from cramlab.auditing.result import KIND, SCHEMA_VERSION, AuditResult
from cramlab.auditing.split import Contexts, Split, count_tokens
from cramlab.config import to_dict
from cramlab.hf.attention_sites import AttentionSite

# A layer with this R or more is called predictable, and one whose replacement costs more than this loss is called
# costly; see docs/audit.md.
PREDICTABLE_R = 0.5
REMOVABLE_NATS = 0.01


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Results of all stages; `other` and `causal` are None when not measured."""

    parts: Split
    other: Split | None
    fits: Sequence[SiteFit]
    tally: Tally
    causal: CausalSums | None
    seconds: Mapping[str, float]


def assemble(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    config: AuditConfig,
    measured: Measured,
    decode: Callable[[list[int]], str] | None,
) -> AuditResult:
    """Computes all figures with their intervals."""
    tally = measured.tally
    bootstrap = Bootstrap(len(measured.parts.test), config.n_bootstrap, config.confidence, config.seed)
    device = next(model.parameters()).device
    header = records.header(device)
    data = header | {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "versions": header["versions"] | {name: records.package_version(name) for name in ("transformers", "gguf")},
        "model": _model(model, sites),
        "text": _text(measured.parts, measured.other, measured.causal, config),
        "config": to_dict(config),
        "seconds": {name: round(s, 2) for name, s in measured.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "probes": {name: _probe(tally, name, measured.fits, bootstrap) for name in tally.probes},
        "head_shares": _head_shares(tally, bootstrap),
        "distribution": _distribution(tally),
        "by_position": _groups(tally, bootstrap, [f"{a}-{b}" for a, b in tally.bins], 0),
        "by_class": _groups(tally, bootstrap, CLASSES, len(tally.bins)),
        "by_rank": _by_rank(tally, bootstrap),
        "by_document": _by_document(tally),
        "loss": None if measured.causal is None else _loss(measured.causal, config),
        "examples": {
            name: [_example(e, decode) for _, _, e in sorted(getattr(tally, name), key=lambda kept: -kept[0])]
            for name in ("best", "worst")
        },
        "controls": {},
    }
    if data["loss"] is not None:
        data["verdict"] = _verdict(data)
    return AuditResult(data)


def peak_memory_bytes() -> int:
    """Returns the peak memory of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _model(model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, Any]:
    return {
        "name": type(model).__name__,
        "family": getattr(getattr(model, "config", None), "model_type", None),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "layers": [site.layer for site in sites],
        "n_heads": sites[0].n_heads,
        "d_model": sites[0].d_model,
    }


def _text(parts: Split, other: Split | None, causal: CausalSums | None, config: AuditConfig) -> dict[str, Any]:
    def size(part: Sequence[Contexts]) -> dict[str, int]:
        return {"documents": len(part), "tokens": count_tokens(part)}

    sizes = {name: size(getattr(parts, name)) for name in ("fit", "validation", "test")}
    if other is not None:
        sizes |= {"other_fit": size(other.fit), "other_validation": size(other.validation)}
    if causal is not None:
        sizes["causal"] = {"documents": len(causal.nats), "tokens": causal.n_contexts * config.context}
    copies = {"text": parts.n_copies} | ({} if other is None else {"other": other.n_copies})
    return {"name": None, "parts": sizes, "copies": copies}


def _ratios(sums: Tensor) -> dict[str, Tensor]:
    """Computes figures from sums (..., [r, cosine, error, energy, tokens, error of the mean])."""
    r, cosine, error, energy, n, mean_error = sums.unbind(dim=-1)
    return {
        "r": r / n,
        "r_pooled": 1 - (error / energy).sqrt(),
        "r2": 1 - error / mean_error,
        "cosine": cosine / n,
    }


def _probe(tally: Tally, name: str, fits: Sequence[SiteFit], bootstrap: Bootstrap) -> dict[str, Any]:
    """Returns the figures of one probe on all layers and heads."""
    own = tally.sums[:, tally.probes.index(name)]  # (documents, layers, units, 5)
    mean_error = tally.sums[:, tally.probes.index("mean"), ..., 2:3]
    sums = torch.cat([own, mean_error], dim=-1)
    figures = {}
    for measure in ("r", "r_pooled", "r2", "cosine"):
        units = bootstrap(sums, lambda s, measure=measure: _ratios(s)[measure])
        overall = bootstrap(sums[..., -1, :], lambda s, measure=measure: _ratios(s)[measure].mean(dim=-1))
        figures[measure] = (units.tolist(), overall.tolist())
    return {
        "layers": {measure: [row[-1] for row in units] for measure, (units, _) in figures.items()},
        "heads": {measure: [row[:-1] for row in units] for measure, (units, _) in figures.items()}
        if name in (MAIN, "mean")
        else None,
        "overall": {measure: overall for measure, (_, overall) in figures.items()},
        "strengths": [list(fit.strengths[name]) for fit in fits] if name in fits[0].strengths else None,
    }


def _head_shares(tally: Tally, bootstrap: Bootstrap) -> dict[str, dict[str, list[float]]]:
    """Returns shares of heads by their mean R, as in the paper; also for the mean alone, and by centred R^2."""

    def shares(values: Tensor) -> Tensor:
        flat = values.flatten(-2)
        above, below = (flat > 0.8).double().mean(dim=-1), (flat < 0.5).double().mean(dim=-1)
        return torch.stack([above, 1 - above - below, below], dim=-1)

    mean_error = tally.sums[:, tally.probes.index("mean"), :, :-1, 2:3]
    shares_by = {}
    for label, probe, measure in (("r", MAIN, "r"), ("r_of_mean", "mean", "r"), ("r2", MAIN, "r2")):
        sums = torch.cat([tally.sums[:, tally.probes.index(probe), :, :-1], mean_error], dim=-1)
        estimates = bootstrap(sums, lambda s, measure=measure: shares(_ratios(s)[measure])).tolist()
        shares_by[label] = dict(zip(("above_0.8", "0.5_to_0.8", "below_0.5"), estimates, strict=True))
    return shares_by


def _distribution(tally: Tally) -> dict[str, Any]:
    """Returns the histogram of tokens by R of the layer's output, and quantiles over tokens of every unit."""
    edges = torch.linspace(-1, 1, N_BINS + 1)
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    cumulative = tally.histogram.cumsum(dim=-1) / tally.histogram.sum(dim=-1, keepdim=True)
    places = [(cumulative < q - 1e-12).sum(dim=-1).clamp(max=N_BINS - 1) for q in quantiles]
    centres = (edges[:-1] + edges[1:]) / 2
    values = torch.stack([centres[place] for place in places], dim=-1)  # (layers, units, quantiles)
    return {
        "edges": edges.tolist(),
        "layers": tally.histogram[:, -1].long().tolist(),
        "quantiles": list(quantiles),
        "layer_quantiles": values[:, -1].tolist(),
        "head_quantiles": values[:, :-1].tolist(),
    }


def _groups(tally: Tally, bootstrap: Bootstrap, names: Sequence[str], first: int) -> list[dict[str, Any]]:
    """Returns R and centred R^2 of the layers' outputs in groups of tokens."""
    rows = []
    for i, name in enumerate(names):
        sums = tally.groups[:, :, first + i]  # (documents, layers, [r, error, error of the mean, tokens])

        def r(s: Tensor) -> Tensor:
            return s[..., 0] / s[..., 3].clamp(min=1)

        def r2(s: Tensor) -> Tensor:
            return 1 - s[..., 1] / s[..., 2].clamp(min=1e-12)

        rows.append(
            {
                "group": name,
                "tokens": int(sums[:, 0, 3].sum()),
                "overall": {
                    "r": bootstrap(sums, lambda s, r=r: r(s).mean(dim=-1)).tolist(),
                    "r2": bootstrap(sums, lambda s, r2=r2: r2(s).mean(dim=-1)).tolist(),
                },
                "layers": {"r": r(sums.sum(dim=0)).tolist(), "r2": r2(sums.sum(dim=0)).tolist()},
            }
        )
    return rows


def _by_rank(tally: Tally, bootstrap: Bootstrap) -> dict[str, Any]:
    """Returns the centred R^2 of the layers' outputs by rank of the probe; rank 0 is the mean."""
    estimates: Estimates = bootstrap(tally.ranks, lambda s: 1 - s / s[..., :1])
    return {"ranks": tally.rank_grid, "r2": estimates.tolist()}


def _by_document(tally: Tally) -> dict[str, Any]:
    """Returns the sums of each test document, which allow a paired comparison of audits on the same documents."""
    own = tally.sums[:, tally.probes.index(MAIN), :, -1]
    mean = tally.sums[:, tally.probes.index("mean"), :, -1]
    return {
        "tokens": own[:, 0, 4].long().tolist(),
        "r": own[..., 0].tolist(),
        "error": own[..., 2].tolist(),
        "mean_error": mean[..., 2].tolist(),
    }


def _loss(causal: CausalSums, config: AuditConfig) -> dict[str, Any]:
    """Returns nats per token without replacement, and the increase under each one, paired by document."""
    bootstrap = Bootstrap(len(causal.nats), config.n_bootstrap, config.confidence, config.seed)
    base = bootstrap(torch.stack([causal.nats[:, 0], causal.n_tokens], dim=1), lambda s: s[..., 0] / s[..., 1])
    sums = torch.cat([causal.nats, causal.n_tokens[:, None]], dim=1)
    increases = iter(bootstrap(sums, lambda s: (s[..., 1:-1] - s[..., :1]) / s[..., -1:]).tolist())
    loss: dict[str, Any] = {"kind": causal.kind, "nats_per_token": base.tolist()}
    for family, replacements in causal.replacements.items():
        rows = []
        for first in replacements[:: len(KINDS)]:
            row = {"sites": list(first.sites), "share": first.share, "choice": first.choice}
            rows.append(row | {kind: next(increases) for kind in KINDS})
        loss[family] = rows
    return loss


def _verdict(data: dict[str, Any]) -> dict[str, Any]:
    """Returns which layers are predictable, which are costly to replace, and how the two are correlated."""
    r = [estimate[0] for estimate in data["probes"][MAIN]["layers"]["r"]]
    r2 = [estimate[0] for estimate in data["probes"][MAIN]["layers"]["r2"]]
    alone = [row["probe"] for row in data["loss"]["alone"]]
    numbers = data["model"]["layers"]
    costly = [low is not None and low == low and low > REMOVABLE_NATS for _, low, _ in alone]
    predictable = [value >= PREDICTABLE_R for value in r]

    def rank_correlation(values: Sequence[float]) -> float | None:
        if len(values) < 3 or len(set(values)) == 1:
            return None
        from scipy.stats import spearmanr  # imported here, so that the audit's text can be read without scipy

        return float(spearmanr(values, [value for value, _, _ in alone])[0])  # type: ignore[arg-type]

    return {
        "predictable_r": PREDICTABLE_R,
        "removable_nats": REMOVABLE_NATS,
        "predictable": [n for n, p in zip(numbers, predictable, strict=True) if p],
        "costly": [n for n, c in zip(numbers, costly, strict=True) if c],
        "predictable_not_removable": [n for n, p, c in zip(numbers, predictable, costly, strict=True) if p and c],
        "rank_correlation_r_with_loss": rank_correlation(r),
        "rank_correlation_r2_with_loss": rank_correlation(r2),
    }


def _example(example: Example, decode: Callable[[list[int]], str] | None) -> dict[str, Any]:
    def text(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if decode is None else decode(list(ids))

    return {
        "r": example.r,
        "document": example.document,
        "position": example.position,
        "before": text(example.before),
        "token": text([example.token]),
        "after": text(example.after),
    }
