r"""Consolidates SmolLM2-135M on one accelerator and measures it: one command, continued by the same command.

    python -m reproduction.protocols.consolidated_smollm2 runs/smollm2 --device cuda

Steps, each of them a command of its own in a process of its own, with its output in OUT/logs:

- `p02`: learns with contexts of 2,048, 4,096 and 8,192 tokens, half of them with planted repeats; bound 0.02.
- `p05`, `p05-lengths`: the same gates for a bound of 0.05, at 2,048 tokens, and at all lengths under one guarantee.
- `prose`: the same gates for prose, by `--from`.
- `compared`: loss against skipped reads at all lengths and on prose.
- `retrieval-90`, `retrieval-75`: planted numbers, one of eight, earlier lines.
- `artifact`: what ships in artifacts/smollm2-135m, with numbers that a test checks.

A finished step is kept; one that was stopped continues from its last saved document. `--jobs 4` runs steps that do not
wait for each other side by side.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SETTINGS = (
    "context=2048", "fit_documents=52", "sensitivity_documents=15", "validation_documents=16",
    "calibration_documents=80", "test_documents=28", "local_steps=16", "end_steps=500", "batch_contexts=8",
    "learning_contexts=1500", "adapter_bytes=3700000",
    "strengths=0.01,0.1,1.0", "learning_lengths=4096,8192", "planted_frac=0.5",
    "skipped_fracs=0.5,0.6,0.7,0.75,0.8,0.85,0.9,0.92,0.95,0.98,1.0",
)  # fmt: skip
_POLL_S = 0.5


class Step(NamedTuple):
    """One command.

    Attributes:
        name: its name.
        command: arguments of the Python that runs it.
        after: name of the step that it needs; "": none.
    """

    name: str
    command: list[str]
    after: str = ""


def steps(args: argparse.Namespace) -> list[Step]:
    """All steps, in order."""
    out: Path = args.out
    on, text = ["--device", args.device], ["--text", args.text]
    settings = [part for setting in (*SETTINGS, *args.set) for part in ("--set", setting)]
    further = [] if args.further_text is None else ["--further-text", args.further_text]
    lengths, documents = [str(n) for n in args.lengths], ["--documents", str(args.documents)]

    def consolidated(name: str, bound: float, *more: str, after: str = "") -> Step:
        command = ["-m", "cramlab", "consolidate", args.model, "--max-loss-increase", f"{bound:g}", *on, *more]
        return Step(name, [*command, "--out", str(out / name), "--resume"], after)

    def protocol(name: str, module: str, *more: str, after: str = "p02") -> Step:
        return Step(name, ["-m", f"reproduction.protocols.{module}", *more], after)

    def retrieval(share: int) -> Step:
        name = f"retrieval-{share}"
        given = [args.model, str(out / "p05"), *text, *on, "--context", str(args.context), "--skipped-frac",
                 f"{share / 100:g}", "--prompts", str(args.prompts), "--kinds", *args.kinds]  # fmt: skip
        return protocol(name, "far_retrieval", *given, "--out", str(out / f"{name}.json"), after="p05")

    start = ["--from", str(out / "p02")]
    at_all = [] if not lengths else ["--set", f"calibrated_lengths={','.join(lengths)}"]

    def compared(name: str, folder: str, *rules: str) -> Step:
        given = [args.model, *text, *on, "--from", str(out / folder), *documents, "--contexts", *lengths]
        more = ["--other", args.prose, "--rules", *rules, "--out", str(out / name)]
        return protocol(name, "compare_consolidation", *given, *more, after=folder)

    shipped = [str(out / "p02"), str(out / "artifact"), "--model", args.model, *text]
    return [
        consolidated("p02", args.bound, *text, *further, *settings),
        protocol("artifact", "ship_consolidation", *shipped),
        consolidated("p05", 2.5 * args.bound, *text, *start, after="p02"),
        consolidated("p05-lengths", 2.5 * args.bound, *text, *start, *at_all, after="p02"),
        consolidated("prose", 2.5 * args.bound, "--text", args.prose, *start, after="p02"),
        compared("compared", "p02", "gate", "window", "layers"),
        retrieval(90),
        retrieval(75),
    ]


def run(wanted: Sequence[Step], out: Path, n_jobs: int) -> list[str]:
    """Runs the steps that are not done yet, at most `n_jobs` at a time; returns the names of those that failed."""
    for name in ("done", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    done = {step.name for step in wanted if _done(out, step) == step.command}
    waiting = [step for step in wanted if step.name not in done]
    running: dict[str, tuple[Step, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            for step in [step for step in waiting if step.after in failed]:
                failed.append(step.name)
                waiting.remove(step)
            for step in [step for step in waiting if not step.after or step.after in done][: n_jobs - len(running)]:
                waiting.remove(step)
                with (out / "logs" / f"{step.name}.log").open("ab") as log:
                    started = subprocess.Popen([sys.executable, *step.command], stdout=log, stderr=subprocess.STDOUT)
                running[step.name] = step, started
                print(time.strftime("%H:%M:%S"), step.name, "begins", flush=True)
            time.sleep(_POLL_S)
            for step, process in [one for one in running.values() if one[1].poll() is not None]:
                del running[step.name]
                print(time.strftime("%H:%M:%S"), step.name, "failed" if process.returncode else "is done", flush=True)
                if process.returncode:
                    failed.append(step.name)
                else:
                    done.add(step.name)
                    (out / "done" / f"{step.name}.json").write_text(json.dumps(step.command))
    finally:
        for _, process in running.values():
            process.terminate()
            process.wait()
    return failed


def _done(out: Path, step: Step) -> list[str] | None:
    """The command with which a step was finished; None: it was not."""
    path = out / "done" / f"{step.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument(
        "--further-text", metavar="TEXT", help="further text for gradient steps, such as torch's sources"
    )
    parser.add_argument("--prose", default="prose", metavar="TEXT", help="text of another kind")
    parser.add_argument("--bound", type=float, default=0.02, help="bound of the first folder, nats per token")
    parser.add_argument("--context", type=int, default=2048, help="length of prompts of retrieval, tokens")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192], help="further lengths, tokens")
    parser.add_argument("--documents", type=int, default=24, help="documents compared at each length, at most")
    parser.add_argument("--prompts", type=int, default=48, help="prompts of each kind of retrieval, at most")
    parser.add_argument("--kinds", nargs="*", default=["needle", "earlier line", "one of eight"])
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a setting of learning"
    )
    parser.add_argument("--only", nargs="*", metavar="STEP", help="names of steps; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="steps side by side, at most")
    return parser


def main(given: Sequence[str] | None = None) -> int:
    """Runs the steps; the exit status is 1 when one of them failed."""
    args = parser().parse_args(given)
    planned = steps(args)
    if unknown := set(args.only or ()) - {step.name for step in planned}:
        parser().error(f"--only {' '.join(sorted(unknown))}: the steps are {', '.join(step.name for step in planned)}")
    if args.jobs < 1:
        parser().error(f"--jobs {args.jobs} must be at least 1")
    if args.only is not None:
        planned = [step._replace(after=step.after if step.after in args.only else "")
                   for step in planned if step.name in args.only]  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run` ends its processes
    for name in (failed := run(planned, args.out, args.jobs)):
        print(f"{name} failed, or a step that it needs: see {args.out / 'logs'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
