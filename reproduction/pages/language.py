"""Renews docs/language.md, its figures and its short table in docs/results.md from results/language/CORPUS.

python -m reproduction.pages.language
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from cramlab.report.intervals import Interval, seed_interval
from reproduction import goals
from reproduction.analysis.language import (
    FREQUENT,
    Arms,
    Record,
    attention,
    best_fixed,
    difference,
    familiarity,
    nats,
    pairs,
    practice_curve,
    practice_law,
    recalled,
)
from reproduction.pages import language_figure, markdown
from reproduction.pages.renew import renew
from reproduction.protocols.language import ARMS
from reproduction.protocols.static_gates import arm_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "language"
PAGE, FIGURES = ROOT / "docs" / "language.md", ROOT / "docs" / "figures"
RESULTS_PAGE = ROOT / "docs" / "results.md"
CORPORA = ("code", "english")
GATED = ("cram-12", "cram-3", "soft-12", "straight-12", "random-12")


def read(results: Path, corpus: str) -> dict[str, list[Record]]:
    """Records of the runs on a corpus by arm, in the order of `ARMS`, then of names; each arm's by seed.

    Raises:
        ValueError: when the runs were not all trained on the same text.
    """
    found: dict[str, list[Record]] = defaultdict(list)
    for record in _documents(results / "language" / corpus):
        if record["kind"] == "text":
            found[record["config"]["arm"]].append(record)
    found.pop("ship", None)  # of another size
    if len(texts := {run["text_sha256"] for runs in found.values() for run in runs}) > 1:
        raise ValueError(f"results/language/{corpus} has records of {len(texts)} texts; keep those of one")
    names = [*(arm for arm in ARMS if arm in found), *sorted(found.keys() - ARMS.keys())]
    return {arm: sorted(found[arm], key=lambda record: record["config"]["seed"]) for arm in names}


def searched(results: Path, corpus: str) -> frozenset[str]:
    """Arms whose learning rate was chosen by short runs at several rates."""
    rates: dict[str, set[float]] = defaultdict(set)
    for record in _documents(results / "language" / corpus / "tuning"):
        rates[record["config"]["arm"]].add(record["config"]["learning_rate"])
    return frozenset(arm for arm, tried in rates.items() if len(tried) > 1)


def _documents(folder: Path) -> list[Record]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def sections(results: Path) -> dict[str, str]:
    """The generated parts of the page by name."""
    found = {corpus: section(results, corpus) for corpus in CORPORA}
    return found | {"goals": goals.render("language", results / "goals")}


def section(results: Path, corpus: str) -> str:
    """What the page says of a corpus."""
    arms, folder = read(results, corpus), results / "language" / corpus
    if not arms:
        return "There are no records of this corpus."
    compared = "\n".join(comparisons(arms, _documents(folder)))
    parts = [setting(arms), table(arms), figure(corpus), compared, familiar(arms), rates(_documents(folder / "tuning"))]
    return "\n\n".join(part.strip() for part in parts if part)


def setting(arms: Arms) -> str:
    """How the runs were trained, from their records."""
    runs = [run for found in arms.values() for run in found]
    configs = [run["config"] for run in runs]
    steps, tokens = (
        _spread(values) for values in ([c["n_steps"] for c in configs], [run["series"][-1]["n_tokens"] for run in runs])
    )
    devices = sorted({run["hardware"]["accelerator"] or run["hardware"]["processor"] for run in runs})
    at_once = _spread([run["runs_at_once"] for run in runs])
    config = configs[0]
    return (
        f"{config['n_layers']} layers of width {config['d_model']}, contexts of {config['context']:,} tokens, "
        f"{config['batch_size']} contexts a step, {steps} steps, {tokens} tokens; {len(runs)} runs on "
        f"{', '.join(devices)}, {at_once} at a time."
    )


def _spread(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def table(arms: Arms) -> str:
    """A row for each arm, by loss, lowest first."""
    rows = []
    for arm, runs in arms.items():
        context = runs[0]["config"]["context"]
        cells = [
            arm, str(len(runs)), _mean(map(nats, runs), 3),
            _share(map(attention, runs), 3), _share(map(pairs, runs), 3),
            *(_mean([run["test"][part]["nats"] for run in runs], 3) for part in ("repeated", "fresh")),
            _share([recalled(run, "lookup", "n_pairs", 16) for run in runs], 2),
            _share([recalled(run, "copying", "n_tokens", 64) for run in runs], 2),
            *(_share([recalled(run, "needle", "context", n) for run in runs], 2) for n in (context, 2 * context)),
            f"{runs[0]['config']['learning_rate']:g}", f"{runs[0]['n_parameters'] / 1e6:.1f}",
            f"{statistics.fmean(run['ms_per_step'] for run in runs):.0f}", by_layer(runs),
        ]  # fmt: skip
        rows.append((statistics.fmean(map(nats, runs)), cells))
    columns = [
        "arm", "seeds", "nats", "attention", "pairs", "repeated", "fresh", "lookup", "copying", "needle",
        "needle, twice as far", "rate", "M parameters", "ms a step",
        "reads by layer; encoding ended at step",
    ]  # fmt: skip
    return markdown.table(columns, (cells for _, cells in sorted(rows)))


def short_table(arms: Arms) -> str:
    """Loss, share of reads and copying of each arm: some columns of `table`."""
    head, _, *lines = table(arms).splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    kept = [names.index(name) for name in ("arm", "seeds", "nats", "attention", "copying")]
    rows = ([line.strip("|").split("|")[i].strip() for i in kept] for line in lines)
    return markdown.table(["arm", "seeds", "nats per token", "tokens that read, mean over layers", "copying"], rows)


def by_layer(runs: Sequence[Record]) -> str:
    """Reads of each layer where tokens choose, and the step at which encoding ended."""
    if "encoding_ended_at" not in runs[0]["series"][-1]:
        return ""
    layers = zip(*(run["test"]["all"]["reads_frac_by_layer"] for run in runs), strict=True)
    ended = _spread([run["series"][-1]["encoding_ended_at"] for run in runs])
    return f"{', '.join(f'{statistics.fmean(layer):.2f}' for layer in layers)}; {ended}"


def _mean(values: Iterable[float | None], digits: int) -> str:
    """The mean over seeds, with its 95% interval if there are several."""
    found = [value for value in values if value is not None]
    return seed_interval(found).format(digits) if found else "-"


def _share(values: Iterable[float | None], digits: int) -> str:
    """The mean of shares, from 0 to 1."""
    found = [value for value in values if value is not None]
    return seed_interval(found).within(0, 1).format(digits) if found else "-"


def figure(corpus: str) -> str:
    """The link to a corpus's figure."""
    return f"![Loss, attention over training, chance to read: {corpus}](figures/{language_figure.name(corpus)})"


def comparisons(arms: Arms, documents: Sequence[Record]) -> list[str]:
    """Differences in nats between arms, each with what it shows."""
    fixed = best_fixed(arms)
    lines = [] if fixed is None else [f"- Best of the fixed single layers, by loss on validation text: `{fixed}`."]
    for one, other in (
        ("cram-12", fixed), ("cram-3", fixed), ("cram-12", "llama"), ("cram-12", "random-12"),
        ("cram-12", "layers-3-5-7"), ("cram-12", "soft-12"), ("cram-12", "straight-12"), ("cram-12-window", "window"),
        ("cram-12-bigrams", "layer-7-bigrams"), ("cram-12-bigrams", "llama-bigrams"),
    ):  # fmt: skip
        diff = None if other is None else difference(arms, one, other)
        if diff is not None:
            shares = (_share(map(attention, arms[str(arm)]), 3) for arm in (one, other))
            lines.append(f"- `{one}` minus `{other}`: {diff.format(3)} nats; attention {' and '.join(shares)}: "
                         f"**{verdict(diff, 'ahead', 'behind')}**.")  # fmt: skip
    for record in documents:
        if record["kind"] == "static gates":
            arm = arm_of(record["layers"])
            lines.append(f"- Static gates learned together keep layers {record['layers']}: "
                         + (f"arm `{arm}`." if arm else "an arm that was not trained."))  # fmt: skip
    return lines


def verdict(diff: Interval, below: str, above: str) -> str:
    """What a difference shows: a word for one below zero, one for above, or that the interval has zero inside."""
    word = below if diff.mean < 0 else above
    if diff.low is None or diff.high is None:
        return f"{word}, one seed"
    return word if diff.low > 0 or diff.high < 0 else "undecided"


def familiar(arms: Arms) -> str:
    """Reads of consolidated and of fresh n-grams, and the chance to read against encounters, of gated arms."""
    lines = []
    for arm in (arm for arm in GATED if arm in arms):
        for n_gram in ("trigram", "bigram"):
            found = [value for run in arms[arm] if (value := familiarity(run, n_gram)) is not None]
            diff = seed_interval(found) if found else None
            shown = ["-", "-"] if diff is None else [diff.format(3), verdict(diff, "less", "no less")]
            lines.append([arm, n_gram, *shown, *_curve(arms[arm], n_gram)])
    if not lines:
        return ""
    columns = [
        "arm", "n-gram", f"reads at n-grams seen {FREQUENT:,} times or more, minus those never seen, equally hard",
        "consolidated n-grams are read ... than fresh ones", "share of reads: never seen", "seen once",
        "seen 1,024 to 2,047 times", "likeliest law", "exponent of the power law",
    ]  # fmt: skip
    return markdown.table(columns, lines)


def _curve(runs: Sequence[Record], n_gram: str) -> list[str]:
    k, share, _ = practice_curve(runs, n_gram)
    at = {round(float(x)): f"{y:.3f}" for x, y in zip(k, share, strict=True)}
    law = practice_law(runs, n_gram)
    return [at.get(0, "-"), at.get(1, "-"), at.get(round((1024 * 2047) ** 0.5), "-"),
            *(("-", "-") if law is None else (law[0], f"{law[1]:.2f}"))]  # fmt: skip


def rates(tuned: Sequence[Record]) -> str:
    """Loss on validation text by learning rate, of the short runs that chose it."""
    if not tuned:
        return "No learning rate was searched: every arm has that of the table."
    tried = sorted({record["config"]["learning_rate"] for record in tuned})
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for record in tuned:
        config = record["config"]
        found[config["arm"]][config["learning_rate"]] = record["series"][-1]["nats_per_token"]
    columns = [f"nats on validation text after {tuned[0]['config']['n_steps']} steps at", *(f"{r:g}" for r in tried)]
    return markdown.table(
        columns,
        ([arm, *(f"{losses[r]:.3f}" if r in losses else "" for r in tried)] for arm, losses in found.items()),
    )


def renew_page(results: Path = RESULTS.parent) -> None:
    """Rewrites the figures and the page."""
    for corpus in CORPORA:
        if arms := read(results, corpus):
            language_figure.draw(arms, corpus, FIGURES)
    renew(PAGE, sections(results))
    renew(RESULTS_PAGE, {"language models": short_table(read(results, "code"))})


if __name__ == "__main__":
    renew_page()
