"""Measures the repository: start-up, report, sizes, tests, and whether runs give the numbers of an earlier revision.

    python -m reproduction.house --revision 2726e48          # everything else, some minutes
    python -m reproduction.house --only tests first_look     # `make test` and `make srcd SIZE=quick`, timed
    python -m reproduction.house --only goals                # goals, and their table in docs/architecture.md

Each part replaces its own figures in results/house/house.json. Times are of a whole process on this machine: wall time,
and the CPU time that it took, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.files import write_json
from reproduction import goals
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "results" / "house" / "house.json", ROOT / "docs" / "architecture.md"
REPEATS = 5
REFUSED = {
    "an unknown command": ["trian"],
    "an unknown experiment": ["run", "scrd", "--out", "x"],
    "an unknown size": ["run", "srcd", "--size", "smal", "--out", "x"],
    "an unknown mixer": ["run", "srcd/cramm", "--out", "x"],
    "an unknown setting": ["run", "srcd", "--out", "x", "--set", "training.max_step=3"],
    "a folder without records": ["report", "nowhere", "--out", "x.html"],
    "a missing text": ["audit", "glassllm", "--text", "nowhere.txt", "--out", "x"],
    "an unknown setting of a consolidation": [
        "consolidate",
        "glassllm",
        "--text",
        "stdlib",
        "--out",
        "x",
        "--set",
        "rnk=3",
    ],
}
VERBS = ("run", "eval", "cost", "report", "audit", "consolidate", "irregular", "ls", "show")
LINES = 400  # a longer file needs a reason


def timed(command: Sequence[str], repeats: int = REPEATS, codes: Sequence[int] = (0,)) -> dict[str, Any]:
    """Median wall and CPU seconds of a command, the first run left out.

    Raises:
        SystemExit: the command ended with another code than expected.
    """
    wall, cpu = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats + 1):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            wall.append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            if ended.returncode not in codes:
                raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-500:]}")
    return {"wall_s": statistics.median(wall[1:]), "cpu_s": statistics.median(cpu[1:]), "repeats": repeats}


def start_up() -> dict[str, Any]:
    """Importing the package beyond torch, help texts and refusals of the command."""
    code = "import time, torch; t = time.process_time(); import cramlab; print(time.process_time() - t)"
    beyond = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(REPEATS + 1)
    ]
    cramlab = [sys.executable, "-m", "cramlab"]
    helps = {"cramlab --help": timed([*cramlab, "--help"])}
    helps |= {f"cramlab {verb} --help": timed([*cramlab, verb, "--help"]) for verb in VERBS}
    return {
        "import_beyond_torch_s": statistics.median(beyond[1:]),
        "help": helps,
        "refusals": {what: timed([*cramlab, *arguments], codes=(2,)) for what, arguments in REFUSED.items()},
    }


def report() -> dict[str, Any]:
    """One page from everything in results/."""
    command = [sys.executable, "-m", "cramlab", "report", str(ROOT / "results"), "--out", "page.html"]
    return timed(command, repeats=2)


def sizes() -> dict[str, Any]:
    """Files, lines and words of the repository as git knows it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    code = [name for name in tracked if name.startswith("src/") and name.endswith(".py")]
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in code}
    results = [ROOT / name for name in tracked if name.startswith("results/")]
    marks = (ROOT / "README.md").read_text(encoding="utf-8").split()
    pages = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
             for name in ("docs/index.md", "docs/performance.md", "docs/claims.md")}  # fmt: skip
    contracts = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True
    ).stdout
    kept, broken = map(int, re.search(r"Contracts: (\d+) kept, (\d+) broken", contracts).groups())  # type: ignore[union-attr]
    return {
        "code_files": len(code), "code_lines": sum(lengths.values()),
        "files_past_400_lines": {name: n for name, n in lengths.items() if n > LINES},
        "results_bytes": sum(path.stat().st_size for path in results),
        "results_lines": sum(path.read_bytes().count(b"\n") for path in results),
        "readme_words": sum(any(map(str.isalpha, mark)) for mark in marks),
        "readme_marks": len(marks),
        "page_lines": pages,
        "import_contracts": {"kept": kept, "broken": broken},
        "circles": len(circles()),
    }  # fmt: skip


def circles() -> list[list[str]]:
    """Groups of modules that import one another at import time; imports inside functions are left out."""
    source = ROOT / "src"
    modules = {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
               for path in source.rglob("*.py")}  # fmt: skip
    arrows: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    arrows[name].add(inner if inner in modules else node.module)
            elif isinstance(node, ast.Import):
                arrows[name].update(alias.name for alias in node.names)
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    order = sorted(modules)
    place = {name: i for i, name in enumerate(order)}
    pairs = [(place[a], place[b]) for a, ends in arrows.items() for b in ends if b in place and a != b]
    graph = csr_array(([1] * len(pairs), tuple(zip(*pairs, strict=True))), shape=(len(order), len(order)))
    _, group = connected_components(graph, directed=True, connection="strong")
    groups: dict[int, list[str]] = {}
    for name, number in zip(order, group.tolist(), strict=True):
        groups.setdefault(number, []).append(name)
    return [members for members in groups.values() if len(members) > 1]


def equality(revision: str) -> dict[str, Any]:
    """Four small SRCD runs by today's code and by another revision's, compared number by number."""
    archive = subprocess.run(["git", "archive", revision, "src"], cwd=ROOT, check=True, capture_output=True).stdout
    fields = ("series", "metrics", "samples", "practice", "n_parameters", "n_steps", "consolidation_ratio")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        found: dict[str, dict[str, Any]] = {}
        for which, source in (("today", ROOT / "src"), ("before", Path(folder) / "src")):
            out = Path(folder) / which
            command = [
                sys.executable, "-m", "cramlab", "run", "srcd/cram,cram-paper,transformer,seqboat", "--size", "tiny",
                "--seed", "3", "--set", "training.max_steps=40", "--jobs", "1", "--out", str(out),
            ]  # fmt: skip
            surroundings = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=surroundings, check=True, capture_output=True)
            found[which] = {
                path.parent.name: {field: json.loads(path.read_text())[field] for field in fields}
                for path in sorted(out.rglob("record.json"))
            }
    runs = {name: found["today"].get(name) == run for name, run in found["before"].items()}
    return {"revision": revision, "equal": runs}


def tests() -> dict[str, Any]:
    """`make test` in the environment that is there."""
    start = time.perf_counter()
    ended = subprocess.run(["make", "test"], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    counted = dict.fromkeys(("passed", "failed", "skipped"), 0)
    counted |= {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped)", ended.stdout)}
    return {"wall_s": seconds, "code": ended.returncode, **counted}


def first_look() -> dict[str, Any]:
    """`make srcd SIZE=quick` in the environment that is there: CRAM, full attention and the report."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(["make", "srcd", "SIZE=quick", f"OUT={folder}/runs"], cwd=ROOT, check=True, capture_output=True)
        return {"wall_s": time.perf_counter() - start}


def quick() -> list[dict[str, Any]]:
    """The records of SRCD at the size quick."""
    return [records.read(path) for path in records.find([ROOT / "results" / "srcd" / "quick"])]


def answered(record: dict[str, Any]) -> list[goals.Goal]:
    """The goals that follow from the record and the runs of the size quick."""
    command, own = "python -m reproduction.house", ["results/house/house.json"]
    made: list[goals.Goal] = []

    def goal(what: str, target: str, reached: float, met: bool, interval: Any = None, **other: Any) -> None:
        made.append(goals.Goal(goal=what, target=target, reached=round(reached, 4), interval=interval, met=met,
                               command=other.get("command", command), record=other.get("record", own)))  # fmt: skip

    if "start_up" in record:
        start = record["start_up"]
        beyond = start["import_beyond_torch_s"]
        goal("import cramlab beyond torch, CPU seconds", "at most 0.5", beyond, beyond <= 0.5)
        for name, rows in (("help text", start["help"]), ("refusal of bad arguments", start["refusals"])):
            slowest = max(rows, key=lambda row: rows[row]["cpu_s"])
            seconds = rows[slowest]["cpu_s"]
            goal(f"slowest {name} of {len(rows)} ({slowest}), CPU seconds", "at most 0.5", seconds, seconds <= 0.5)
    if "report" in record:
        seconds = record["report"]["wall_s"]
        goal("cramlab report results, seconds on two cores", "at most 20", seconds, seconds <= 20)
    if "sizes" in record:
        found = record["sizes"]
        goal("results/, MB", "at most 12 (a third of 35)", found["results_bytes"] / 1e6, found["results_bytes"] <= 12e6)
        what = f"words of README.md that have a letter, of {found['readme_marks']} by wc -w"
        goal(what, "at most 900", found["readme_words"], found["readme_words"] <= 900)
        for page, most in (("docs/index.md", 100), ("docs/performance.md", 150)):
            n = found["page_lines"][page]
            goal(f"lines of {page}", f"at most {most}", n, n <= most)
        n = len(found["files_past_400_lines"])
        goal("files of the package past 400 lines", "0", n, n == 0)
        n = found["import_contracts"]["broken"] + found["circles"]
        goal("circles of imports, and broken rules of direction", "0", n, n == 0)
    if "equality" in record:
        equal = record["equality"]["equal"]
        what = f"runs under a fixed seed with the numbers of {record['equality']['revision']}"
        goal(what, f"{len(equal)} of {len(equal)}", sum(equal.values()), all(equal.values()))
    if "first_look" in record:
        seconds = record["first_look"]["wall_s"]
        goal("make srcd SIZE=quick after installation, seconds on two cores", "about 90", seconds, seconds <= 100)
    if "tests" in record:
        found = record["tests"]
        goal(
            "make test on two cores, minutes",
            "at most 6",
            found["wall_s"] / 60,
            found["wall_s"] <= 360 and not found["code"],
        )
    runs = [run for run in quick() if run["mixer"] == "cram"]
    if runs:
        tests = [run["metrics"]["test"] for run in runs]
        novel = [test["retrieval_acc_novel"] for test in tests]
        ratio = [test["attention_frac"] / test["oracle_attention_frac"] for test in tests]
        wanted = {"command": "make srcd SIZE=quick", "record": ["results/srcd/quick"]}
        seeds = f"worst of seeds {', '.join(str(run['seed']) for run in runs)}"
        goal(f"size quick: novel retrieval, {seeds}", "at least 0.95", min(novel), min(novel) >= 0.95, **wanted)
        goal(f"size quick: attention over the optimum, {seeds}", "at most 1.5", max(ratio), max(ratio) <= 1.5, **wanted)
    return made


def main() -> None:
    """Measures the requested parts, then writes the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default="2726e48", help="whose runs are compared with today's (default: 2726e48)")
    parser.add_argument("--only", nargs="+", default=["start_up", "report", "sizes", "equality", "goals"])
    args = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "start_up": start_up, "report": report, "sizes": sizes, "tests": tests, "first_look": first_look,
        "equality": lambda: equality(args.revision),
    }  # fmt: skip
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for part in (name for name in args.only if name != "goals"):
        record |= records.header(torch.device("cpu")) | {"kind": "house", part: parts[part]()}
        write_json(RECORD, record)
        print(part, flush=True)
    goals.write("house", answered(record))
    renew(PAGE, {"goals": goals.render("house")})


if __name__ == "__main__":
    main()
