"""The live display of training runs: a table and curves in a terminal, one line per validation elsewhere."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cramlab.cli.curves import curve

if TYPE_CHECKING:
    from cramlab.training.run import RunConfig

_CURVE_WIDTH, _CURVE_HEIGHT = 30, 4  # characters


class ProgressDisplay:
    """Shows the newest row of each run and its curves so far. Use as a context manager and call with rows.

    Args:
        n_tokens: the most training tokens of each run, by name; the time that all runs take follows from them.
        console: where to draw; standard output by default.
    """

    def __init__(self, n_tokens: Mapping[str, int], console: Console | None = None) -> None:
        self.console = console or Console()
        self._n_tokens = n_tokens
        self._announced = False
        self._history: dict[str, list[dict[str, Any]]] = {}
        self._left: dict[str, str] = {}
        self._live = Live(get_renderable=self._screen, console=self.console, refresh_per_second=2, transient=True)

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
        history = self._history.setdefault(row["name"], [])
        self._left[row["name"]] = time_left(history[-1] if history else None, row)
        history.append(row)
        if len(history) == 3 and not self._announced:  # the first row holds the warm-up
            self.console.print(announcement(self._history, self._n_tokens), soft_wrap=True, highlight=False)
            self._announced = True
        if row["validation"] is not None and not self.console.is_terminal:
            self.console.print(self._line(row), soft_wrap=True, highlight=False)

    def _line(self, row: dict[str, Any]) -> str:
        cells = self._cells(row["name"])
        return (
            f"{row['name']} step {row['step']}/{row['max_steps']} N={row['seq_len']} {row['phase']}: "
            f"loss {cells['loss']}; recurring {cells['recurring']}, novel {cells['novel']}; "
            f"attention {cells['attention']} (optimum {cells['optimum']}); {cells['left']} left"
        )

    def _cells(self, name: str) -> dict[str, str]:
        history = self._history[name]
        validation = next((row["validation"] for row in reversed(history) if row["validation"] is not None), {})

        def number(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        return {
            "loss": " ".join(f"{term} {value:.3f}" for term, value in history[-1]["loss"].items()),
            "recurring": number(validation.get("retrieval_acc_recurring"), ".3f"),
            "novel": number(validation.get("retrieval_acc_novel"), ".3f"),
            "attention": number(validation.get("attention_frac"), ".4f"),
            "optimum": number(validation.get("oracle_attention_frac"), ".4f"),
            "left": self._left[name],
        }

    def _screen(self) -> Group:
        """The table, and below it the curves of as many running runs as the terminal has lines for."""
        running = [name for name in self._n_tokens if name in self._history and not self._history[name][-1]["last"]]
        drawn: list[Columns] = []
        if not self.console.options.ascii_only:
            n_lines = self.console.height - 4 - 3 * len(running)
            drawn = [self._curves(name) for name in running[: max(n_lines // (_CURVE_HEIGHT + 1), 0)]]
        return Group(self._table(running), *drawn)

    def _table(self, running: list[str]) -> Table:
        table = Table(expand=True)
        for column in ("run", "step", "", "phase", "loss", "recurring", "novel", "attention", "optimum", "left"):
            table.add_column(column, min_width=16 if column == "" else None)
        for name in running:
            row, cells = self._history[name][-1], self._cells(name)
            phase = "cooling down" if row["cooling_down"] else row["phase"]
            table.add_row(
                name,
                f"{row['step']}/{row['max_steps']}",
                ProgressBar(total=row["max_steps"], completed=row["step"]),
                f"{phase}, N={row['seq_len']}",
                *(cells[c] for c in ("loss", "recurring", "novel", "attention", "optimum", "left")),
            )
        n_waiting = sum(name not in self._history for name in self._n_tokens)
        n_finished = len(self._n_tokens) - n_waiting - len(running)
        if n_finished or n_waiting:
            table.caption = f"{n_finished} of {len(self._n_tokens)} runs trained, {n_waiting} starting or waiting"
        return table

    def _curves(self, name: str) -> Columns:
        """Attention share (log axis), retrieval of novel bindings and task loss of one run, over its steps."""
        history = self._history[name]
        validated = [(row["step"], row["validation"]) for row in history if row["validation"] is not None]
        attention = [(step, v["attention_frac"]) for step, v in validated if v["attention_frac"] is not None]
        novel = [(step, v["retrieval_acc_novel"]) for step, v in validated if v["retrieval_acc_novel"] is not None]
        loss = [(row["step"], row["loss"]["task"]) for row in history]
        least = 0.8 * min((v["oracle_attention_frac"] or 1 for _, v in validated), default=0.01)
        most_loss = max(value for _, value in loss)
        plots = (
            (f"{name}: attention, 1 to {least:.3f}", attention, max(least, 1e-4), 1.0, True),
            ("retrieval, novel, 0 to 1", novel, 0.0, 1.0, False),
            (f"task loss, 0 to {most_loss:.1f}", loss, 0.0, most_loss, False),
        )
        return Columns(
            [
                Text("\n".join([title, *curve(points, low=low, high=high, width=_CURVE_WIDTH, height=_CURVE_HEIGHT,
                                              log=log)]))
                for title, points, low, high, log in plots
            ],
            padding=(0, 2),
        )  # fmt: skip


def most_tokens(config: RunConfig) -> int:
    """Training tokens of a run if every stage uses all its steps."""
    *short, last = config.training.stages
    left, total = config.training.max_steps, 0
    for stage in short:
        n_steps = min(stage.max_steps, left)
        left, total = left - n_steps, total + n_steps * stage.batch_size * config.task_at(stage).seq_len
    return total + left * last.batch_size * config.task_at(last).seq_len


def announcement(history: Mapping[str, list[dict[str, Any]]], n_tokens: Mapping[str, int]) -> str:
    """One line on how long all runs take at the pace of the first steps.

    Args:
        history: rows so far of the runs that have begun, by name.
        n_tokens: the most training tokens of every run, by name.
    """
    paces = [
        (rows[-1]["elapsed_s"] - rows[0]["elapsed_s"]) / max(rows[-1]["n_tokens"] - rows[0]["n_tokens"], 1)
        for rows in history.values()
        if len(rows) > 1
    ]
    left = [total - (history[name][-1]["n_tokens"] if name in history else 0) for name, total in n_tokens.items()]
    seconds = max(sum(left) / max(len(history), 1), max(left)) * sum(paces) / len(paces)
    time = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    runs = "1 run" if len(n_tokens) == 1 else f"{len(n_tokens)} runs"
    return f"at this machine's pace, {runs} take at most about {time}; a run ends sooner when it stops improving"


def time_left(before: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """Time to the last step at the pace of the newest rows, as H:MM:SS; a run that stops improving ends sooner."""
    n_steps = row["step"] - (before["step"] if before else 0)
    seconds = row["elapsed_s"] - (before["elapsed_s"] if before else 0.0)
    left_s = seconds / max(n_steps, 1) * (row["max_steps"] - row["step"])
    return str(datetime.timedelta(seconds=round(left_s)))
