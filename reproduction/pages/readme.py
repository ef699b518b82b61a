"""The tables and the two figures of README.md, from the records in results/.

python -m reproduction.pages.readme
"""

from __future__ import annotations

import json
from pathlib import Path

from cramlab import records
from cramlab.files import write_text
from cramlab.report.plots import attention_over_steps
from cramlab.report.tables import origin, summarise
from reproduction.pages.consolidation_plots import loss_by_share
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[2]
SRCD, CONSOLIDATION = ROOT / "results" / "srcd", ROOT / "results" / "consolidate" / "smollm2"
SIZES = ("quick", "small", "paper")
RULES = {
    "gate": "CRAM's gates and adapters",
    "random": "random tokens skip, same adapters",
    "layers": "whole layers skip, same adapters",
    "window": "window everywhere, no adapters",
}


def sections() -> dict[str, str]:
    """Text by the name in its marks."""
    found = records.read_all([SRCD])
    columns = ("size, tokens", "model", "seeds", "retrieval, novel", "share that reads", "/ optimum",
               "dynamics error / control")  # fmt: skip
    rows = []
    for row in sorted(summarise(found), key=lambda row: SIZES.index(row.size)):
        n_tokens = next(record["config"]["task"]["seq_len"] for record in found if record["size"] == row.size)
        cells = (
            f"{row.size}, {n_tokens:,}",
            row.mixer,
            ", ".join(map(str, row.seeds)),
            row.novel.format(4),
            row.attention_frac.format(4),
            f"{row.attention_frac.mean / row.oracle_attention_frac:.2f}",
            "-" if row.dynamics_ratio is None else f"{row.dynamics_ratio:.3f}",
        )
        rows.append(cells)
    hardware = sorted({origin(record).partition("; code")[0] for record in found})
    return {
        "results": "\n".join([table(columns, rows), *(f"- {line}" for line in hardware)]),
        "consolidation": _consolidation(),
    }


def _consolidation() -> str:
    columns = ("certified increase, nats per token", "far reads skipped", "increase on test documents", "pairs scored")
    rows = []
    for path in sorted(CONSOLIDATION.glob("p*/consolidation.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        test, bound = record["test"], record["promise"]["increase"]
        increase = f"{test['increase']:.3f} ± {test['standard_error']:.3f}"
        rows.append((f"{bound:g}", f"{test['skipped_frac']:.0%}", increase, f"{test['pairs_frac']:.0%}"))
    return table(columns, rows)


def figures() -> dict[str, str]:
    """SVG text by file name: attention in training, and loss against skipped reads."""
    small = records.read_all([SRCD / "small"])
    compared = json.loads((CONSOLIDATION / "comparison.json").read_text(encoding="utf-8"))
    tests = [
        json.loads(path.read_text(encoding="utf-8"))["test"] for path in CONSOLIDATION.glob("p*/consolidation.json")
    ]
    certified = sorted((test["skipped_frac"], test["increase"]) for test in tests)
    place = f"SmolLM2-135M, contexts of {compared['config']['context']:,} tokens"
    return {
        "attention_small.svg": attention_over_steps(small),
        "skipping.svg": loss_by_share({place: compared["rows"]}, RULES, certified),
    }


def write() -> None:
    """Rewrites README.md and its figures."""
    renew(ROOT / "README.md", sections())
    for name, text in figures().items():
        write_text(ROOT / "docs" / "figures" / name, text)


if __name__ == "__main__":
    write()
