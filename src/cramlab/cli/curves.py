"""Small line plots for a terminal, drawn in braille characters of 2 x 4 dots each."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bit of each dot, by column and row of a character


def curve(
    points: Sequence[tuple[float, float]], *, low: float, high: float, width: int, height: int, log: bool = False
) -> list[str]:
    """Draws a line through points.

    Args:
        points: (x, y) with x rising; the x axis runs from the first to the last. y outside [low, high] is drawn at the
            edge, a value that is not finite is left out.
        low: y at the bottom; positive if `log`.
        high: y at the top.
        width: characters a line.
        height: lines.
        log: whether the y axis is logarithmic.

    Returns:
        `height` strings of `width` braille characters, top line first.
    """
    cells = [[0] * width for _ in range(height)]
    columns, rows = 2 * width, 4 * height
    points = [(x, y) for x, y in points if math.isfinite(y)]
    scale = math.log if log else float
    bottom, top = scale(low), scale(high)
    before: tuple[int, int] | None = None
    for x, y in points:
        share_x = (x - points[0][0]) / ((points[-1][0] - points[0][0]) or 1)
        share_y = (scale(min(max(y, low), high)) - bottom) / ((top - bottom) or 1)
        dot = round(share_x * (columns - 1)), round((1 - share_y) * (rows - 1))
        for column, row in _line(before or dot, dot):
            cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
        before = dot
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from one to another, both included."""
    n = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [(round(start[0] + (end[0] - start[0]) * i / n), round(start[1] + (end[1] - start[1]) * i / n))
            for i in range(n + 1)]  # fmt: skip
