"""Goals of consolidation answered from the records: `python -m reproduction.consolidation_goals`.

It writes results/goals/consolidate.json. A goal without a record has no figure, and a note that says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.goals import Goal, write
from reproduction.pages.consolidate import RESULTS
from reproduction.pages.consolidation_plots import mean_and_error

TOPIC = "consolidate"
FOLDER, NEEDLE = RESULTS / "smollm2", "retrieval-p05"
LENGTHS = {1024: "comparison-stdlib-1024", 2048: "comparison", 4096: "comparison-stdlib-4096",
           8192: "comparison-stdlib-8192"}  # fmt: skip
LEARN = (
    "cramlab consolidate smollm2 --text stdlib --further-text torch --device cuda --max-loss-increase 0.02 "
    "--out runs/smollm2 --set context=2048 --set learning_lengths=4096,8192 --set planted_frac=0.5 "
    "--set batch_contexts=8"
)
COMPARE = "python -m reproduction.protocols.compare_consolidation smollm2 --text stdlib --from runs/smollm2"
ROOT = RESULTS.parents[1]


def _goal(
    goal: str, target: str, reached: float | None, met: bool, command: str, *record: Path,
    interval: Sequence[float] | None = None, note: str = "",
) -> Goal:  # fmt: skip
    paths = [path.relative_to(ROOT).as_posix() for path in record]
    figure = None if reached is None else round(reached, 4)
    made = Goal(
        goal=goal, target=target, reached=figure, interval=interval, met=met, command=command, record=paths
    )  # fmt: skip
    if note:
        made["note"] = note
    return made


def _load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _increase(length: int, rule: str, share: float) -> tuple[float, float]:
    """Mean increase of a rule at a share asked for, nats per token, and its standard error."""
    rows = _load(LENGTHS[length])["rows"]
    return mean_and_error(next(r["increase"] for r in rows if (r["rule"], r["asked"]) == (rule, share)))


def _losses() -> list[Goal]:
    goals = []
    for length, targets in ((2048, {0.75: 0.006, 0.9: 0.02}), (8192, {0.75: 0.012, 0.9: 0.035})):
        for share, most in targets.items():
            mean, error = _increase(length, "gate", share)
            goals.append(_goal(
                f"{length:,} tokens, {share:.0%} of far reads skipped: loss increase, nats per token",
                f"at most {most:g}", mean, mean <= most, COMPARE, FOLDER / f"{LENGTHS[length]}.json",
                interval=[round(mean - 1.96 * error, 4), round(mean + 1.96 * error, 4)],
            ))  # fmt: skip
    return goals


def _static() -> Goal:
    """The largest ratio of our loss to that of whole layers, over all lengths and both shares."""
    ratios = [
        _increase(length, "gate", share)[0] / _increase(length, "layers", share)[0]
        for length in LENGTHS for share in (0.75, 0.9)
    ]  # fmt: skip
    return _goal("loss increase divided by that of the best static rule (whole layers), largest over four lengths and "
                 "two shares", "at most 0.333", max(ratios), max(ratios) <= 1 / 3, COMPARE,
                 *(FOLDER / f"{name}.json" for name in LENGTHS.values()))  # fmt: skip


def _needle() -> Goal:
    found = _load(NEEDLE)
    right = {who: np.array(rows["right"]) for who, rows in found["kinds"]["needle"].items()}
    kept = right["consolidated"][right["original"]]
    share, n = float(kept.mean()), len(kept)
    z = 1.96  # Wilson's interval
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    interval = [round((middle + sign * width) / (1 + z * z / n), 4) for sign in (-1, 1)]
    return _goal(f"planted numbers kept of {n} at {found['skipped_frac']:.0%} of far reads skipped, 2,048 tokens",
                 "at least 0.95", share, share >= 0.95,
                 "python -m reproduction.protocols.far_retrieval smollm2 runs/smollm2 --text stdlib --prompts 48",
                 FOLDER / f"{NEEDLE}.json", interval=interval)  # fmt: skip


def _unanswered(goal: str, target: str, note: str) -> Goal:
    return _goal(goal, target, None, False, "", note=note)


def _promise() -> Goal:
    """The folder whose guarantee holds at several lengths, on test documents of each."""
    if not (FOLDER / "p05-lengths").exists():
        return _unanswered("promise of 0.05 nats per token by length (1,024 to 8,192 tokens)", "at most 0.05",
                           "no folder was calibrated at several lengths on an accelerator")  # fmt: skip
    record = _load("p05-lengths/consolidation")
    tests = {record["config"]["context"]: record["test"]} | {row["length"]: row["test"] for row in record["lengths"]}
    worst = max(tests, key=lambda length: tests[length]["increase"])
    bound, error = record["promise"]["increase"], tests[worst]["standard_error"]
    reached = tests[worst]["increase"]
    lengths = ", ".join(f"{length:,}" for length in sorted(tests))
    return _goal(
        f"promise of {bound:g} nats per token by length ({lengths} tokens): largest increase on test documents, at "
        f"{worst:,} tokens, {record['test']['skipped_frac']:.0%} of far reads skipped at 2,048",
        f"at most {bound:g}", reached, reached <= bound, f"{LEARN} --set calibrated_lengths=1024,4096,8192",
        FOLDER / "p05-lengths" / "consolidation.json",
        interval=[round(reached - 1.96 * error, 4), round(reached + 1.96 * error, 4)],
    )  # fmt: skip


def _prose() -> Goal:
    goal, target = "prose, calibrated anew by --from: far reads skipped under a promise of 0.05", "at least 0.8"
    path = FOLDER / "prose" / "consolidation.json"
    command = (
        "cramlab consolidate smollm2 --text prose --from artifacts/smollm2-135m --max-loss-increase 0.05 --out OUT"
    )
    if not path.exists():
        return _unanswered(goal, target, "not run")
    share = json.loads(path.read_text(encoding="utf-8"))["test"]["skipped_frac"]
    return _goal(goal, target, share, share >= 0.8, command, path)


def _times() -> list[Goal]:
    """Times of the folders that were made before lengths were learned; nothing that they depend on has changed."""
    folder = RESULTS / "smollm2-two-cores" / "consolidation.json"
    timed = RESULTS / "smollm2" / "decode-8192-p05.json"
    minutes = sum(json.loads(folder.read_text(encoding="utf-8"))["seconds"].values()) / 60
    found = json.loads(timed.read_text(encoding="utf-8"))
    speed = {
        what: {way: row["speedup"]["median"] for way, row in found[what]["ways"].items()}
        for what in ("decode", "prompt")
    }
    decode = speed["decode"]["consolidated"] / speed["decode"]["growing cache"]
    prompt, note = speed["prompt"]["consolidated"], "not timed anew"
    learn = "cramlab consolidate smollm2 --text stdlib --max-loss-increase 0.05 --out runs/less"
    bench = "python -m benchmarks.consolidated_decode"
    rows = [
        ("stages of the defaults on two cores at 1,024 tokens, minutes", "at most 25", minutes, minutes <= 25, learn),
        ("a prompt of 2,048 tokens on a CPU: speed beside the original", "at least 1.0", prompt, prompt >= 1, bench),
        ("decoding after 8,192 tokens on a CPU: speed beside the original with a cache that writes in place",
         "at least 2.0", decode, decode >= 2, bench),
    ]  # fmt: skip
    return [_goal(*row, folder if row[-1] is learn else timed, note=note) for row in rows]


def goals() -> list[Goal]:
    """Every goal with its figure, or why there is none."""
    return [
        *_losses(),
        _needle(),
        _promise(),
        _prose(),
        _unanswered(
            "75% of far reads skipped and 50% of far keys dropped: loss increase, nats per token", "at most 0.02",
            "there is a read gate and no write gate: keys that nobody will ask for are not dropped",
        ),
        _static(),
        *_times(),
        _unanswered(
            "RULER's synthetic tasks at 4,096 and 8,192 tokens, original against consolidated, points", "at most 0.5",
            "not run",
        ),
        _unanswered("loss beside kvpress at equal bytes of far keys and values read", "a table of both", "not run"),
    ]  # fmt: skip


if __name__ == "__main__":
    print(write(TOPIC, goals()).relative_to(ROOT))
