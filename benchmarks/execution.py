"""What skipping saves in seconds and bytes, on one core.

    python -m benchmarks.execution                        # everything: about a quarter of an hour on a quiet core
    python -m benchmarks.execution --longest 4096 scan    # some rows, up to a length

Nothing is timed unless routed equals dense and steps equal one pass. Then a table, and as the last line the whole
result as JSON, which is also in results/bench/execution.json: written after every row, so an interrupted run continues.
A finished one is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import rows
from benchmarks.accelerator import routed_parity, steps_parity
from cramlab import records
from cramlab.files import write_json

ROOT = Path(__file__).parent.parent
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
SHARES = (0.016, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
ROWS = {
    "scores": lambda n: rows.scores([n]),
    "share": lambda n: rows.scores([n], SHARES) if n == 4096 else (),
    "tier": lambda n: rows.tier([n]),
    "layer": lambda n: rows.layer_forward([n]),
    "training": lambda n: rows.training_step([n]),
    "decode": lambda n: rows.decode([n]) if n >= 1024 else (),
    "scan": lambda n: rows.scan([n]),
}


def main() -> int:
    """Returns 1, having timed nothing, when parity does not hold, and 3 when time ran out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], metavar="N", help="greatest length, tokens")
    parser.add_argument("--minutes", type=float, default=20.0, help="minutes after which nothing begins (default: 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "execution.json", metavar="FILE")
    args = parser.parse_args()
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        parser.error(f"row {unknown[0]!r} is unknown; known: {', '.join(ROWS)}")
    end = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    held = parity(512)
    if not held["holds"]:
        print(f"parity is broken, so nothing is timed: {held['differences']}", file=sys.stderr)
        return 1
    result = begun(args.out) or records.header(torch.device("cpu")) | {
        "kind": "timings",
        "d_model": rows.D,
        "n_heads": rows.N_HEADS,
        "seconds": "of the process on a core, one thread",
        "parity": held,
        "finished": False,
        # Load before and after each row; above 1, other processes were using the machine.
        "load_average": [os.getloadavg()[0]],
        "rows": [],
    }
    done = {(row["row"], row["n_tokens"]) for row in result["rows"]}
    for n in [n for n in LENGTHS if n <= args.longest]:
        for name in args.rows or ROWS:
            if (name, n) in done:
                continue
            if time.monotonic() > end:
                print(f"out of time before {name} {n}; call again to go on", file=sys.stderr)
                return 3
            torch.manual_seed(0)
            result["rows"] += [{"row": name} | row for row in ROWS[name](n)]
            result["load_average"].append(os.getloadavg()[0])
            write_json(args.out, result)
            print(name, n, file=sys.stderr)
    order = list(ROWS)
    result["rows"].sort(key=lambda row: (order.index(row["row"]), row["n_tokens"]))
    result["finished"] = True
    write_json(args.out, result)
    Console(width=150).print(table(result["rows"]))
    print(json.dumps(result))
    return 0


def parity(n_tokens: int) -> dict:
    """Compares routed with dense execution, and steps with one pass."""
    routed, steps = routed_parity(rows.CPU, n_tokens), steps_parity(rows.CPU, n_tokens)
    return steps | {
        "differences": routed["differences"] | steps["differences"],
        "holds": routed["holds"] and steps["holds"],
    }


def begun(path: Path) -> dict | None:
    """The result of an unfinished run by the same code on the same machine; None without one."""
    if not path.exists():
        return None
    found, now = json.loads(path.read_text(encoding="utf-8")), records.header(torch.device("cpu"))
    same = all(found.get(key) == now[key] for key in ("revision", "hardware", "versions"))
    return found if same and not found.get("finished", True) else None


def table(found: Iterable[rows.Row]) -> Table:
    """A table with a line for each way."""
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
