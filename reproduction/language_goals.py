"""Goals of the language models answered from their records: `python -m reproduction.language_goals`.

A goal whose records are missing has no figure and is not met. Differences are paired by seed; a goal on them is met
only by several seeds, of arms whose learning rates were searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cramlab.report.intervals import Interval, seed_interval
from reproduction import goals
from reproduction.analysis.language import Arms, Record, attention, best_fixed, by_seed, difference, nats, recalled
from reproduction.goals import Goal
from reproduction.pages import language

TOPIC = "language"
TRAIN = "python -m reproduction.protocols.language runs/language/{corpus} --corpus corpora/{corpus} --arms {arms}"
STEP, DECODE = "results/bench/language-step.json", "results/bench/language-decode.json"
SRCD = "results/bench/srcd.json"
SRCD_SIZE = "paper"
NEEDLE = 2048
FLAT = 1.1  # times as long after the longest context as after the shortest, at most


def renew(root: Path = language.ROOT) -> Path:
    """Writes the document of the goals."""
    return goals.write(TOPIC, found(root), root / "results" / "goals")


def found(root: Path) -> list[Goal]:
    """Every goal, in the order of the page."""
    made = []
    for corpus in language.CORPORA:
        searched = language.searched(root / "results", corpus)
        made += [_decided(goal, searched) for goal in _of_corpus(language.read(root / "results", corpus), corpus)]
    return [*made, *_speed(root), *_srcd(root)]


def _decided(goal: Goal, searched: frozenset[str]) -> Goal:
    """A goal on a difference between arms, not met while it rests on one seed or on a rate that was not searched."""
    if goal["reached"] is None:
        return goal
    open_ = [] if goal["interval"] else ["one seed, so no interval"]
    arms = {Path(path).stem.rpartition("-seed")[0] for path in goal["record"]}
    if arms - searched:
        open_.append(f"learning rates not searched: {', '.join(sorted(arms - searched))}")
    if open_:
        goal["note"], goal["met"] = "; ".join(open_), False
    return goal


def _of_corpus(arms: Arms, corpus: str) -> list[Goal]:
    fixed = best_fixed(arms)
    single = ", ".join(arm for arm in arms if arm.startswith("layer-") and arm[6:].isdigit())
    against = f"{fixed}, best of {single} on validation text" if fixed else "the best fixed layer"
    context = _longest(arms)
    return [
        _compared(arms, corpus, "cram-3", fixed, f"{corpus}: cram-3 minus {against}, nats",
                  "at most 0.01, with at most 3% of reads", nats, lambda mean: mean <= 0.01, most=0.03),
        _compared(arms, corpus, "cram-12", fixed, f"{corpus}: cram-12 minus {against}, nats",
                  "at most -0.02, with at most 12.5% of reads", nats, lambda mean: mean <= -0.02, most=0.125),
        _compared(arms, corpus, "cram-12", "llama", f"{corpus}: cram-12 minus Llama, nats",
                  "at most -0.1, with at most 12.5% of reads", nats, lambda mean: mean <= -0.1, most=0.125),
        _compared(arms, corpus, "cram-12", "llama", f"{corpus}: cram-12 minus Llama, accuracy of 16 pairs looked up",
                  "at least 0", lambda run: recalled(run, "lookup", "n_pairs", 16), lambda mean: mean >= 0),
        _compared(arms, corpus, "cram-12", "llama", f"{corpus}: cram-12 minus Llama, accuracy of copying 64 tokens",
                  "at least 0", lambda run: recalled(run, "copying", "n_tokens", 64), lambda mean: mean >= 0),
        _compared(arms, corpus, "cram-12", "llama",
                  f"{corpus}: cram-12 minus Llama, needle in {context:,} tokens found", "at least 0, at 2,048 tokens",
                  lambda run: recalled(run, "needle", "context", context),
                  lambda mean: mean >= 0 and context >= NEEDLE),
    ]  # fmt: skip


def _longest(arms: Arms) -> int:
    """The longest context, up to `NEEDLE`, in which CRAM looked for a needle."""
    sizes = [row["context"] for run in arms.get("cram-12", ()) for row in run["recall"]["needle"]]
    return max((size for size in sizes if size <= NEEDLE), default=NEEDLE)


def _compared(
    arms: Arms, corpus: str, arm: str, other: str | None, goal: str, target: str,
    value: Callable[[Record], float | None], meets: Callable[[float], bool], most: float | None = None,
) -> Goal:  # fmt: skip
    """A difference between two arms; with `most`, the share of reads must not exceed it, to three digits."""
    command = TRAIN.format(corpus=corpus, arms=f"{arm} {other or '...'}")
    missing = [name or "a fixed layer" for name in (arm, other) if name not in arms]
    diff = None if other is None else difference(arms, arm, other, value)
    if missing or other is None or diff is None:
        reason = (
            f"no record of {' or '.join(missing)}" if missing else f"{arm} and {other} have no such figure in common"
        )
        return _goal(goal, target, None, False, command, [], reason)
    one, two = by_seed(arms, arm, value), by_seed(arms, other, value)
    common = one.keys() & two.keys()
    runs = [run for run in arms[arm] if run["config"]["seed"] in common]
    share = sum(map(attention, runs)) / len(runs)
    means = (sum(values[seed] for seed in common) / len(common) for values in (one, two))
    at = " ({:.3f} and {:.3f}".format(*means) + (")" if most is None else f"; reads {100 * share:.1f}%)")
    met = meets(diff.mean) and (most is None or round(share, 3) <= most)
    files = [f"results/language/{corpus}/{name}-seed{seed}.json" for name in (arm, other) for seed in sorted(common)]
    return _goal(goal + at, target, diff, met, command, files)


def _speed(root: Path) -> list[Goal]:
    step, decode = _read(root / STEP), _read(root / DECODE)
    speed: Interval | None = None
    target, command = "at least 1", f"python -m benchmarks.language_step --out {STEP}"
    name, reason = "training step of cram-12 at 2,048 tokens: speed, of the Llama's", f"no record {STEP}"
    if step and "cram-12" in step["ways"] and step["context"] == 2048:
        speed = Interval(mean=step["ways"]["cram-12"]["speedup"]["median"])
        name += f", on {step['hardware']['accelerator'] or step['hardware']['processor']}"
        reason = "median of one series of steps"
    made = [_goal(name, target, speed, bool(speed and speed.mean >= 1), command, [STEP] if speed else [], reason)]
    growth: Interval | None = None
    rows = [row for row in (decode or {"rows": []})["rows"] if row["arm"] == "cram-12"]
    name, command = "decoding of cram-12", f"python -m benchmarks.language_decode --out {DECODE}"
    reason = f"no record {DECODE}"
    if len(rows) > 1:
        first, last = (pick(rows, key=lambda row: row["context"]) for pick in (min, max))
        growth = Interval(mean=last["ms_per_token"]["median"] / first["ms_per_token"]["median"])
        name += f": time of a token after {last['context']:,} tokens over that after {first['context']:,}"
        reason = "ratio of medians"
    flat = bool(growth and growth.mean <= FLAT)
    made.append(_goal(name, f"at most {FLAT}", growth, flat, command, [DECODE] if growth else [], reason))
    rows = (_read(root / SRCD) or {"rows": []})["rows"]
    ratio = dict(zip(("mean", "low", "high"), rows[0]["ratio"], strict=True)) if rows else None
    spent = Interval(**ratio) if ratio else None
    name, command = (
        "SRCD with the default working memory",
        f"python -m benchmarks.against e93c467 --only SRCD --out {SRCD}",
    )
    return [*made, _goal(f"{name}: time of a training run over that before", "at most 1 (an interval that contains 1)",
                         spent, bool(spent and spent.low is not None and spent.low <= 1), command,
                         [SRCD] if spent else [], f"no record {SRCD}")]  # fmt: skip


def _srcd(root: Path) -> list[Goal]:
    """Goals of SRCD with the delta rule as working memory, against leaky integrators at the same size and seeds."""
    delta, leaky = (_runs(root / "results" / "srcd", mixer) for mixer in ("cram-delta", "cram"))
    common = sorted(delta.keys() & leaky.keys())
    test = {key: delta[key]["metrics"]["test"] for key in common}
    steps = [(delta[key]["series"][-1]["step"], leaky[key]["series"][-1]["step"]) for key in common]
    asked: list[tuple[str, str, list[float], Callable[[float], bool]]] = [
        ("retrieval", "at least 0.999", [row["retrieval_acc"] for row in test.values()], lambda mean: mean >= 0.999),
        ("attention over its optimum", "at most 1.0",
         [row["attention_frac"] / row["oracle_attention_frac"] for row in test.values()],
         lambda mean: round(mean, 2) <= 1.0),
        ("steps, of those with leaky integrators", "at most 0.5", [a / b for a, b in steps], lambda mean: mean <= 0.5),
    ]  # fmt: skip
    at = f", {common[0][0]} size" if common else ""
    files = [
        f"results/srcd/{size}/{mixer}-seed{seed}.json" for mixer in ("cram-delta", "cram") for size, seed in common
    ]
    command = f"cramlab run srcd/cram-delta --size {SRCD_SIZE} --seed SEED"
    made = []
    for name, target, values, meets in asked:
        reached = seed_interval(values) if values else None
        met = bool(reached and meets(reached.mean))
        goal, missing = f"SRCD with the delta rule{at}: {name}", "" if values else "no record"
        made.append(_goal(goal, target, reached, met, command, files, missing))
    return made


def _runs(folder: Path, mixer: str) -> dict[tuple[str, int], Record]:
    """Records of a mixer on SRCD by size and seed."""
    return {(path.parent.name, int(path.stem.rpartition("seed")[2])): json.loads(path.read_text(encoding="utf-8"))
            for path in folder.glob(f"{SRCD_SIZE}/{mixer}-seed*.json")}  # fmt: skip


def _goal(
    goal: str, target: str, reached: Interval | None, met: bool, command: str, record: list[str], reason: str = ""
) -> Goal:
    interval = None if reached is None or reached.low is None or reached.high is None else (reached.low, reached.high)
    made: Goal = {
        "goal": goal, "target": target, "reached": None if reached is None else round(reached.mean, 4),
        "interval": None if interval is None else [round(end, 4) for end in interval], "met": met, "command": command,
        "record": record,
    }  # fmt: skip
    if interval is None:
        made["note"] = reason or "one seed, so no interval"
    return made


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    print(renew())
