"""Progress of work that goes document by document."""

from __future__ import annotations

import datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """Shows a bar per stage with the time left; without a terminal, prints a line every half minute."""

    def __init__(self) -> None:
        self.console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"),
                   TimeElapsedColumn(), TextColumn("{task.fields[left]} left"))  # fmt: skip
        self._bars = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._said = 0.0

    def __enter__(self) -> Display:
        """Starts drawing."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops drawing."""
        self._bars.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, stage: str, done: int, n_tokens: int, seconds: float) -> None:
        """Implements `cramlab.auditing.resume.Progress`."""
        left = str(datetime.timedelta(seconds=round(seconds / max(done, 1) * (n_tokens - done))))
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=n_tokens, left=left)
            self._said = 0.0
        self._bars.update(self._tasks[stage], completed=done, left=left)
        if not self.console.is_terminal and (seconds - self._said >= 30 or done == n_tokens):
            self._said = seconds
            self.console.print(f"{stage}: {done}/{n_tokens} tokens, {left} left", highlight=False)
