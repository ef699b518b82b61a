"""The result: one JSON document with a schema, made from the sums."""

from __future__ import annotations

import functools
import importlib.resources
import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema.exceptions
import torch
from torch import Tensor, nn

from cramlab import records
from cramlab.auditing.bootstrap import Bootstrap, Estimates
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.probes import MAIN, SiteFit
from cramlab.auditing.redundancy import CLASSES, N_BINS, Example, Tally
from cramlab.auditing.replacement import KINDS, Replacement
from cramlab.auditing.split import Contexts, Split, count_tokens
from cramlab.config import to_dict
from cramlab.files import write_text
from cramlab.hf.attention_sites import AttentionSite

SCHEMA_VERSION = 1
FILE = "audit.json"
# From this R on a layer is called predictable, and from this loss on not removable; see docs/audit.md.
PREDICTABLE_R = 0.5
REMOVABLE_NATS = 0.01


@dataclass(frozen=True, kw_only=True)
class CausalSums:
    """Losses under replacements.

    Attributes:
        kind: of the loss.
        replacements: what was tried, see `plan`.
        n_contexts: contexts looked at, of all documents.
        n_tokens: tokens with a loss, of each document, (N,).
        nats: summed over them: untouched, then under each replacement in order, (N, 1 + R).
    """

    kind: str
    replacements: Mapping[str, Sequence[Replacement]]
    n_contexts: int
    n_tokens: Tensor
    nats: Tensor


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that the stages found."""

    parts: Split
    other: Split | None
    fits: Sequence[SiteFit]
    tally: Tally
    causal: CausalSums | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class AuditResult:
    """What an audit found. `data` meets the schema `audit.schema.json`; an estimate is [value, low, high]."""

    data: dict[str, Any]

    def layers(self, measure: str, probe: str = MAIN) -> list[list[float]]:
        """`r`, `r_pooled`, `r2` or `cosine` of each layer's answer, as estimates."""
        return self.data["probes"][probe]["layers"][measure]

    def overall(self, measure: str, probe: str = MAIN) -> list[float]:
        """The same, averaged over layers."""
        return self.data["probes"][probe]["overall"][measure]

    def with_control(self, name: str, content: dict[str, Any]) -> AuditResult:
        """The result with a further control in it."""
        return AuditResult(self.data | {"controls": self.data["controls"] | {name: content}})

    def described(self, model: Mapping[str, Any], text: Mapping[str, Any]) -> AuditResult:
        """The result, naming the model and the text that the tokens are from."""
        return AuditResult(
            self.data | {"model": self.data["model"] | dict(model), "text": self.data["text"] | dict(text)}
        )

    def rounded(self) -> AuditResult:
        """The result as it can be read again."""
        return AuditResult(records.finite(_rounded(self.data)))

    def write(self, path: Path) -> None:
        """Writes the validated document, whole or not at all."""
        data = self.rounded().data
        validate(data, str(path))
        write_text(path, json.dumps(data, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> AuditResult:
        """Reads what `write` wrote.

        Raises:
            RecordError: when the file is no audit of this schema version.
        """
        data = records.read_json(path)
        validate(data, str(path))
        return cls(data)


def _rounded(value: Any) -> Any:
    """Six digits of every number: more would only be noise, and a large file."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema that every `audit.json` meets."""
    text = importlib.resources.files("cramlab.auditing").joinpath("audit.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def validate(data: Any, name: str) -> None:
    """Raises `RecordError` unless this is an audit of this version that meets the schema."""
    schema_error(data, schema(), "audit", SCHEMA_VERSION, name)


def schema_error(data: Any, schema: dict[str, Any], kind: str, version: int, name: str) -> None:
    """Raises `RecordError`, which says where, unless `data` is a document of that kind and version."""
    if not isinstance(data, dict) or (data.get("kind"), data.get("schema_version")) != (kind, version):
        found = (data.get("kind"), data.get("schema_version")) if isinstance(data, dict) else type(data).__name__
        raise records.RecordError(
            f'{name} is no "{kind}" of schema_version {version} but {found}; run the audit again, or read it with the '
            "cramlab version that wrote it"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(data))
    if error is not None:
        where = ".".join(str(p) for p in error.absolute_path) or "the document"
        raise records.RecordError(f"{name}: {where}: {error.message}")


def assemble(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    config: AuditConfig,
    measured: Measured,
    decode: Callable[[list[int]], str] | None,
) -> AuditResult:
    """All figures with their intervals."""
    tally = measured.tally
    bootstrap = Bootstrap(len(measured.parts.test), config.n_bootstrap, config.confidence, config.seed)
    device = next(model.parameters()).device
    header = records.header(device)
    data = header | {
        "schema_version": SCHEMA_VERSION,
        "kind": "audit",
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
    """The most memory that this process has held."""
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
    """Figures of sums (..., [r, cosine, error, energy, tokens, error of the mean])."""
    r, cosine, error, energy, n, mean_error = sums.unbind(dim=-1)
    return {
        "r": r / n,
        "r_pooled": 1 - (error / energy).sqrt(),
        "r2": 1 - error / mean_error,
        "cosine": cosine / n,
    }


def _probe(tally: Tally, name: str, fits: Sequence[SiteFit], bootstrap: Bootstrap) -> dict[str, Any]:
    """One probe on all layers and heads."""
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
    """Shares of heads by their mean R, as the paper tells them; also for the mean alone, and by centred R^2."""

    def shares(values: Tensor) -> Tensor:
        flat = values.flatten(-2)
        above, below = (flat > 0.8).double().mean(dim=-1), (flat < 0.5).double().mean(dim=-1)
        return torch.stack([above, 1 - above - below, below], dim=-1)

    mean_error = tally.sums[:, tally.probes.index("mean"), :, :-1, 2:3]
    found = {}
    for label, probe, measure in (("r", MAIN, "r"), ("r_of_mean", "mean", "r"), ("r2", MAIN, "r2")):
        sums = torch.cat([tally.sums[:, tally.probes.index(probe), :, :-1], mean_error], dim=-1)
        estimates = bootstrap(sums, lambda s, measure=measure: shares(_ratios(s)[measure])).tolist()
        found[label] = dict(zip(("above_0.8", "0.5_to_0.8", "below_0.5"), estimates, strict=True))
    return found


def _distribution(tally: Tally) -> dict[str, Any]:
    """Tokens by R of the layer's answer, and quantiles over tokens of every unit."""
    edges = torch.linspace(-1, 1, N_BINS + 1)
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    cumulative = tally.histogram.cumsum(dim=-1) / tally.histogram.sum(dim=-1, keepdim=True)
    places = [(cumulative < q - 1e-12).sum(dim=-1).clamp(max=N_BINS - 1) for q in quantiles]
    centres = (edges[:-1] + edges[1:]) / 2
    found = torch.stack([centres[place] for place in places], dim=-1)  # (layers, units, quantiles)
    return {
        "edges": edges.tolist(),
        "layers": tally.histogram[:, -1].long().tolist(),
        "quantiles": list(quantiles),
        "layer_quantiles": found[:, -1].tolist(),
        "head_quantiles": found[:, :-1].tolist(),
    }


def _groups(tally: Tally, bootstrap: Bootstrap, names: Sequence[str], first: int) -> list[dict[str, Any]]:
    """R and centred R^2 of the layers' answers in groups of tokens."""
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
    """Centred R^2 of the layers' answers by rank of the probe; rank 0 is the mean."""
    estimates: Estimates = bootstrap(tally.ranks, lambda s: 1 - s / s[..., :1])
    return {"ranks": tally.rank_grid, "r2": estimates.tolist()}


def _by_document(tally: Tally) -> dict[str, Any]:
    """Sums of each test document, with which two audits on the same documents can be compared in pairs."""
    own = tally.sums[:, tally.probes.index(MAIN), :, -1]
    mean = tally.sums[:, tally.probes.index("mean"), :, -1]
    return {
        "tokens": own[:, 0, 4].long().tolist(),
        "r": own[..., 0].tolist(),
        "error": own[..., 2].tolist(),
        "mean_error": mean[..., 2].tolist(),
    }


def _loss(causal: CausalSums, config: AuditConfig) -> dict[str, Any]:
    """Nats per token: untouched, and how much more under each replacement, paired by document."""
    bootstrap = Bootstrap(len(causal.nats), config.n_bootstrap, config.confidence, config.seed)
    base = bootstrap(torch.stack([causal.nats[:, 0], causal.n_tokens], dim=1), lambda s: s[..., 0] / s[..., 1])
    sums = torch.cat([causal.nats, causal.n_tokens[:, None]], dim=1)
    increases = iter(bootstrap(sums, lambda s: (s[..., 1:-1] - s[..., :1]) / s[..., -1:]).tolist())
    found: dict[str, Any] = {"kind": causal.kind, "nats_per_token": base.tolist()}
    for family, replacements in causal.replacements.items():
        rows = []
        for first in replacements[:: len(KINDS)]:
            row = {"sites": list(first.sites), "share": first.share, "choice": first.choice}
            rows.append(row | {kind: next(increases) for kind in KINDS})
        found[family] = rows
    return found


def _verdict(data: dict[str, Any]) -> dict[str, Any]:
    """Which layers are predictable, which removable, and whether the one says anything about the other."""
    r = [estimate[0] for estimate in data["probes"][MAIN]["layers"]["r"]]
    r2 = [estimate[0] for estimate in data["probes"][MAIN]["layers"]["r2"]]
    alone = [row["probe"] for row in data["loss"]["alone"]]
    numbers = data["model"]["layers"]
    costly = [low is not None and low == low and low > REMOVABLE_NATS for _, low, _ in alone]
    predictable = [value >= PREDICTABLE_R for value in r]

    def rank_correlation(values: Sequence[float]) -> float | None:
        if len(values) < 3 or len(set(values)) == 1:
            return None
        from scipy.stats import spearmanr  # here, so that text can be had where there is no scipy

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
