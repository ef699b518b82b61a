"""The live display of runs: a table in a terminal, a line a validation elsewhere."""

from __future__ import annotations

import datetime
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table


class ProgressDisplay:
    """Shows the newest row of each run. Use as a context manager and call with rows."""

    def __init__(self, names: list[str], console: Console | None = None) -> None:
        self.console = console or Console()
        self._rows: dict[str, dict[str, Any]] = {}
        self._left: dict[str, str] = {}
        self._validation: dict[str, dict[str, Any]] = {}
        self._names = names
        self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> ProgressDisplay:
        """Starts drawing."""
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops drawing."""
        if self.console.is_terminal:
            self._live.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes a row of `train`'s progress."""
        name = row["name"]
        self._left[name] = time_left(self._rows.get(name), row)
        self._rows[name] = row
        if row["validation"] is not None:
            self._validation[name] = row["validation"]
            if not self.console.is_terminal:
                self.console.print(self._line(row), soft_wrap=True, highlight=False)

    def _line(self, row: dict[str, Any]) -> str:
        cells = self._cells(row["name"])
        return (
            f"{row['name']} step {row['step']}/{row['max_steps']} N={row['seq_len']} {row['phase']}: "
            f"loss {cells['loss']}; recurring {cells['recurring']}, novel {cells['novel']}; "
            f"attention {cells['attention']} (optimum {cells['optimum']}); {cells['left']} left"
        )

    def _cells(self, name: str) -> dict[str, str]:
        row, validation = self._rows[name], self._validation.get(name, {})

        def number(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        return {
            "loss": " ".join(f"{term} {value:.3f}" for term, value in row["loss"].items()),
            "recurring": number(validation.get("retrieval_acc_recurring"), ".3f"),
            "novel": number(validation.get("retrieval_acc_novel"), ".3f"),
            "attention": number(validation.get("attention_frac"), ".4f"),
            "optimum": number(validation.get("oracle_attention_frac"), ".4f"),
            "left": self._left[name],
        }

    def _table(self) -> Table:
        table = Table(expand=True)
        for column in ("run", "step", "", "phase", "loss", "recurring", "novel", "attention", "optimum", "left"):
            table.add_column(column, min_width=16 if column == "" else None)
        waiting = [name for name in self._names if name not in self._rows]
        finished = [name for name, row in self._rows.items() if row["last"]]
        for name in self._names:
            if name in waiting or name in finished:
                continue
            row, cells = self._rows[name], self._cells(name)
            phase = "cooling down" if row["cooling_down"] else row["phase"]
            table.add_row(
                name,
                f"{row['step']}/{row['max_steps']}",
                ProgressBar(total=row["max_steps"], completed=row["step"]),
                f"{phase}, N={row['seq_len']}",
                *(cells[c] for c in ("loss", "recurring", "novel", "attention", "optimum", "left")),
            )
        if finished or waiting:
            table.caption = f"{len(finished)} of {len(self._names)} runs trained, {len(waiting)} starting or waiting"
        return table


def time_left(before: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """Time to the last step at the pace of the newest rows, as H:MM:SS; a run that stops improving ends sooner."""
    n_steps = row["step"] - (before["step"] if before else 0)
    seconds = row["elapsed_s"] - (before["elapsed_s"] if before else 0.0)
    left_s = seconds / max(n_steps, 1) * (row["max_steps"] - row["step"])
    return str(datetime.timedelta(seconds=round(left_s)))
