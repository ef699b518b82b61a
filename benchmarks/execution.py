"""What skipping saves in seconds and bytes, on one core.

    python benchmarks/execution.py                        # everything, about a quarter of an hour
    python benchmarks/execution.py --longest 4096 scan    # some rows, up to a length

First the parity tests: nothing is timed unless routed equals dense and steps equal one pass. Then a table, and as the
last line the whole result as JSON, which is also written to results/bench/execution.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import rows
import torch
from rich.console import Console
from rich.table import Table

from cramlab import records
from cramlab.files import write_json

ROOT = Path(__file__).parent.parent
PARITY = ["tests/memory/test_episodic.py", "tests/memory/test_layer.py"]
LENGTHS = [512, 1024, 2048, 4096, 16384, 32768, 65536]
ROWS = {
    # name: rows up to the length at which a call of the dense way still ends within a minute
    "scores": lambda lengths: rows.scores(lengths),
    "share": lambda lengths: rows.scores(
        [n for n in (4096,) if n in lengths], (0.016, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    ),
    "tier": lambda lengths: rows.tier([n for n in lengths if n <= 32768]),
    "layer": lambda lengths: rows.layer_forward([n for n in lengths if n <= 32768]),
    "training": lambda lengths: rows.training_step([n for n in lengths if n <= 16384]),
    "decode": lambda lengths: rows.decode([n for n in lengths if n >= 1024]),
    "scan": lambda lengths: rows.scan([n for n in lengths if n <= 16384]),
}


def main() -> int:
    """Returns 1, having timed nothing, when a parity test fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], metavar="N", help="greatest length, tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "execution.json", metavar="FILE")
    args = parser.parse_args()
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        parser.error(f"row {unknown[0]!r} is unknown; known: {', '.join(ROWS)}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=0", *PARITY]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        print(f"parity is broken, so nothing is timed; see: {' '.join(command[1:])}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = [n for n in LENGTHS if n <= args.longest]
    load_before, found = os.getloadavg()[0], []
    for name in args.rows or ROWS:
        for row in ROWS[name](lengths):
            found.append({"row": name} | row)
            print(f"{name} {row['n_tokens']}", file=sys.stderr)
    result = records.header(torch.device("cpu")) | {
        "d_model": rows.D,
        "n_heads": rows.N_HEADS,
        "seconds": "of the process on a core, one thread",
        # More than our own thread: others were using the machine.
        "load_average": [load_before, os.getloadavg()[0]],
        "rows": found,
    }
    write_json(args.out, result)
    Console(width=150).print(table(found))
    print(json.dumps(result))
    return 0


def table(found: list[rows.Row]) -> Table:
    """One line a way."""
    shown = Table("row", "tokens", "read", "way", "ms, median [p10, p90]", "speedup, median [p10, p90]", "state bytes")
    for row in found:
        for i, (name, way) in enumerate(row["ways"].items()):
            read = f"{row['read_frac']:.1%}" if "read_frac" in row else ""
            shown.add_row(
                *(("", "", "") if i else (row["what"], f"{row['n_tokens']:,}", read)),
                name,
                "{median:,.2f} [{p10:,.2f}, {p90:,.2f}]".format(**way["ms"]),
                "{median:,.2f} [{p10:,.2f}, {p90:,.2f}]".format(**way["speedup"]),
                f"{row['state_bytes'][name]:,}" if "state_bytes" in row else "",
            )
        shown.add_section()
    return shown


if __name__ == "__main__":
    sys.exit(main())
