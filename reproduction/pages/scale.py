"""Renews docs/scale.md from the records in results/scale: `python -m reproduction.pages.scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reproduction import goals
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew
from reproduction.scale_goals import CPU, CUDA, LONG, ROOT, TOPIC, read

PAGE = ROOT / "docs" / "scale.md"


def sections(root: Path = ROOT) -> dict[str, str]:
    """The text between each pair of marks."""
    made = [measured(record) for path in (CPU, CUDA, LONG) if (record := read(path, root)) is not None]
    text = "\n".join(made) or "There is no record yet."
    return {"measured": text, "goals": goals.render(TOPIC, root / "results" / "goals")}


def measured(record: dict[str, Any]) -> str:
    """Table of training steps by arm and number of devices."""
    hardware = record["hardware"]
    where = hardware["accelerator"] or f"{hardware['processor']}, one thread a process"
    lines = [
        (r["arm"], str(r["devices"]), f"{r['n_parameters'] / 1e6:.1f} M",
         "{median:,.0f} [{p10:,.0f}, {p90:,.0f}]".format(**r["ms"]),
         "{median:,.0f} [{p10:,.0f}, {p90:,.0f}]".format(**r["computing_ms"]), f"{r['tokens_per_s']:,.0f}",
         f"{r['tflops_of_parameters']:.3g}", "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}")
        for r in record["rows"]
    ]  # fmt: skip
    columns = ("arm", "devices", "parameters", "ms a step", "computing, ms a step", "tokens a second",
               "TFLOP a second of the parameters", "GiB a device")  # fmt: skip
    sizes = f"{record['context']:,} tokens a sequence, {record['batch_a_device']} sequences a device"
    return f"{where}; {sizes}:\n\n{table(columns, lines)}"


if __name__ == "__main__":
    renew(PAGE, sections())
