"""Compares the speed of this code with that of another revision: layer, training, language model and patched models.

    OMP_NUM_THREADS=1 python -m benchmarks.against e93c467 --out results/reliability/speed.json

Both revisions run in processes of their own and take turns, repeat by repeat, so that a slow moment of the machine
affects both. Times are CPU seconds of the process; the ratio within a pair of repeats is compared. The same code can be
a quarter slower in one process than in another, for as long as the process lives, so several pairs of processes are
compared, and the interval is over them.
"""

from __future__ import annotations

import argparse
import importlib
import io
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import torch

from cramlab import records
from cramlab.files import write_json

ROOT = Path(__file__).resolve().parent.parent
N_BOOTSTRAP = 2000
N_WARMUPS = 3


def found(*names: str) -> Any:
    """The first of these modules that the revision has: modules have moved."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("cramlab."):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(names)} is here")


def layer_tasks():
    """A CRAM layer: forward, with gradients, and token by token."""
    from cramlab import CRAMConfig

    torch.manual_seed(0)
    layer = CRAMConfig().build(d_model=128)
    x, gaps = torch.randn(4, 512, 128), torch.rand(4, 512)
    with torch.no_grad():
        held = layer.eval()(x, gaps).state

    def forward():
        with torch.no_grad():
            layer.eval()(x, gaps)

    def training():
        output = layer.train()(x, gaps)
        (output.y.square().mean() + sum(output.aux.values())).backward()

    def decode():
        state = held
        with torch.no_grad():
            for t in range(16):
                state = layer.eval()(x[:, t : t + 1], gaps[:, t : t + 1], state=state).state

    return {"layer, 4 x 512 tokens": forward, "layer, with gradients": training, "layer, 16 tokens one by one": decode}


def training_tasks():
    """A training run on SRCD at its smallest size, as `cramlab run` makes it."""
    from cramlab.experiments.srcd import run_config
    from cramlab.training import train

    def run():
        with tempfile.TemporaryDirectory() as folder:
            train(run_config(mixer="cram", size="tiny", seed=0), Path(folder))

    return {"SRCD, a tiny training run": run}


def model_tasks():
    """A CRAM language model of four layers."""
    modeling = found("cramlab.language_model.modeling", "cramlab.hf.modeling")

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    config = modeling.CRAMForCausalLMConfig(**sizes, num_attention_heads=4, state_size=32, semantic_rank=16)
    model, tokens = modeling.CRAMForCausalLM(config).eval(), torch.randint(3, 512, (2, 256))

    def forward():
        with torch.no_grad():
            model(tokens)

    def generate():
        model.generate(tokens, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)

    return {"language model, 2 x 256 tokens": forward, "language model, 16 tokens generated": generate}


def patched_tasks():
    """A Llama with the widths of SmolLM2-135M and six layers, patched; gates are random, so some reads are skipped."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    rule = found("cramlab.consolidation.rules.learned", "cramlab.hf.consolidated")
    patch = found("cramlab.consolidation.patch", "cramlab.hf.consolidated")

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)).eval()
    layers = {}
    for site in patch.consolidatable_sites(model):
        layer = rule.ConsolidatedAttention.beside(site, rank=32, units=64, window=64, n_sinks=4).requires_grad_(False)
        generator = torch.Generator().manual_seed(site.layer)  # the same reads in every revision
        for parameter in layer.parameters():
            parameter.normal_(std=0.02, generator=generator)
        layers[site.layer] = layer
    patch.install(model, layers)
    torch.manual_seed(1)  # building a layer draws another amount of numbers in each revision
    prompt, longer = torch.randint(3, 512, (1, 1024)), torch.randint(3, 512, (1, 2048))
    mask = torch.ones(2, 512, dtype=torch.int64)
    mask[0, :100] = 0
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(longer, past_key_values=cache, logits_to_keep=1)

    def prefill():
        with torch.no_grad():
            model(prompt, logits_to_keep=1, use_cache=False)

    def padded():
        with torch.no_grad():
            model(prompt.view(2, 512), attention_mask=mask, logits_to_keep=1, use_cache=False)

    def decode():
        with torch.no_grad():
            for t in range(16):
                model(prompt[:, t : t + 1], past_key_values=cache)
        cache.crop(-16)

    return {"patched Llama, prompt of 1,024": prefill, "patched Llama, 2 x 512 padded": padded,
            "patched Llama, 16 tokens after 2,048": decode}  # fmt: skip


def work() -> None:
    """Runs in a process of its own: lists the tasks that it can time, then times the requested ones."""
    torch.set_num_threads(1)
    tasks = layer_tasks() | training_tasks() | model_tasks() | patched_tasks()
    print("|".join(tasks), flush=True)
    for line in sys.stdin:
        task = tasks[line.rstrip("\n")]
        start = time.process_time()
        task()
        print(time.process_time() - start, flush=True)


class Revision:
    """One checkout in a process that waits for work."""

    def __init__(self, source: Path) -> None:
        command = [sys.executable, __file__, "--work"]
        environment = {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(source)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        self.tasks = self._line().split("|")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a revision ended without a result; see its error above")
        return line.strip()

    def time(self, task: str) -> float:
        """Seconds of one repeat."""
        assert self.process.stdin is not None
        self.process.stdin.write(task + "\n")
        return float(self._line())


def checked_out(revision: str, folder: Path) -> Path:
    """The sources of a revision."""
    archive = subprocess.run(
        ["git", "archive", revision, "src"], cwd=ROOT, check=True, capture_output=True
    ).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "src"


def compared(pairs: list[list[tuple[float, float]]]) -> dict[str, object]:
    """Median over pairs of processes of their median ratio, today's time over the other's.

    Args:
        pairs: for each pair of processes, seconds of each repeat, today's and the other's.

    Returns:
        The ratio with a 95% bootstrap interval over pairs of processes, median times and the numbers of both.
    """
    ratios = [statistics.median(ours / theirs for ours, theirs in repeats) for repeats in pairs]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(N_BOOTSTRAP))
    low, high = medians[int(0.025 * N_BOOTSTRAP)], medians[int(0.975 * N_BOOTSTRAP)]
    ms, before = (1000 * statistics.median(pair[i] for repeats in pairs for pair in repeats) for i in (0, 1))
    return {
        "ratio": [statistics.median(ratios), low, high], "ms": ms, "ms_before": before,
        "repeats": len(pairs[0]), "process_pairs": len(pairs),
    }  # fmt: skip


def timed(ours: Revision, theirs: Revision, task: str, repeats: int) -> list[tuple[float, float]]:
    """Seconds of each repeat in one pair of processes, which take turns; the first repeats warm up."""
    found = []
    for repeat in range(N_WARMUPS + repeats):
        order = (ours, theirs) if repeat % 2 else (theirs, ours)
        times = {one is ours: one.time(task) for one in order}
        if repeat >= N_WARMUPS:
            found.append((times[True], times[False]))
    return found


def main() -> None:
    """Runs what the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="to compare with, as git names it")
    parser.add_argument("--processes", type=int, default=8, help="pairs of processes (default: 8)")
    parser.add_argument("--repeats", type=int, default=10, help="repeats of each task in a process (default: 10)")
    parser.add_argument("--only", default="", help="tasks whose name begins so (default: all)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    if args.revision is None or args.out is None:
        parser.error("give a revision and --out")
    with tempfile.TemporaryDirectory() as folder:
        before = checked_out(args.revision, Path(folder))
        seconds: dict[str, list[list[tuple[float, float]]]] = {}
        for number in range(args.processes):
            with Revision(ROOT / "src") as ours, Revision(before) as theirs:
                for task in (task for task in ours.tasks if task.startswith(args.only)):
                    seconds.setdefault(task, []).append(timed(ours, theirs, task, args.repeats))
            print(f"{number + 1} of {args.processes} pairs of processes", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = [{"what": task, **compared(pairs)} for task, pairs in seconds.items()]
    for row in rows:
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["ratio"])
        print(f"{row['what']}: {ratio}, {row['ms']:.2f} ms, {row['ms_before']:.2f} before")
    header = records.header(torch.device("cpu"))
    write_json(args.out, {"kind": "speed", **header, "revision_before": args.revision, "threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
