"""Curves as plain text, for a terminal or a pipe: a letter for each, on a grid of characters as wide as there is room.

It consists of ASCII characters, which every terminal and file can show; where there are colours, each curve has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Point = tuple[float, float]

ROWS = 10
WIDEST, NARROWEST = 64, 20  # columns of the grid
TINY = 1e-9  # a range of x that is no range
LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
SEVERAL = "*"  # where curves meet


@dataclass(frozen=True, kw_only=True)
class TextChart:
    """What rich prints. Curves without points are only listed. The grid shows the range of the later three quarters of
    each curve; what lies beyond, such as the score of the first epoch, is drawn at its edge."""

    curves: Sequence[tuple[str, Sequence[Point]]]  # a name, and points (x, y) with ascending x
    x_label: str
    show: Callable[[float], str]  # a y in words
    best: Callable[[Sequence[float]], float] = max

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for line in self._lines(options.max_width):
            text = Text(overflow="fold")
            for part, colour in line:
                text.append(part, style=colour)
            yield text

    def _lines(self, width: int) -> list[list[tuple[str, str | None]]]:
        """Each a list of texts and their colours."""
        drawn = [points for _, points in self.curves if points]
        low, high = _range(drawn)
        last = max((points[-1][0] for points in drawn), default=0.0)
        last = last if last > TINY else 1.0
        every = [y for points in drawn for _, y in points]
        labels = {ROWS - 1: ("<= " if min(every, default=low) < low else "") + self.show(low)}
        if high > low:
            labels[0] = (">= " if max(every, default=high) > high else "") + self.show(high)
        margin = max(map(len, labels.values()))
        columns = min(WIDEST, width - margin - 3)
        lines: list[list[tuple[str, str | None]]] = []
        if drawn and columns >= NARROWEST:
            for row, cells in enumerate(self._grid(columns, low, high, last)):
                frame = f"{labels.get(row, ''):>{margin}} |"
                lines.append([(frame, None), *((cell, self._colour(cell)) for cell in cells)])
            end = f"{last:g}"
            lines.append([(f"{'':>{margin}} +{'-' * columns}", None)])
            lines.append([(f"{'':>{margin}}  0{self.x_label:^{columns - 1 - len(end)}}{end}", None)])
        for number, (name, points) in enumerate(self.curves):
            letter = LETTERS[number % len(LETTERS)]
            lines.append([(letter, self._colour(letter)), (f"  {name}: {self._describe(points)}", None)])
        return lines

    def _grid(self, columns: int, low: float, high: float, last: float) -> list[list[str]]:
        grid = [[" "] * columns for _ in range(ROWS)]
        for number, (_, points) in enumerate(self.curves):
            letter = LETTERS[number % len(LETTERS)]
            for column in range(columns):
                if (value := _value_at(points, column, columns, last)) is None:
                    continue
                height = (min(max(value, low), high) - low) / (high - low) if high > low else 0.0
                row = ROWS - 1 - round(height * (ROWS - 1))
                grid[row][column] = letter if grid[row][column] in (" ", letter) else SEVERAL
        return grid

    def _describe(self, points: Sequence[Point]) -> str:
        if not points:
            return "no validations"
        values = [y for _, y in points]
        best = self.best(values)
        at, _ = points[values.index(best)]
        last = "" if values[-1] == best else f", {self.show(values[-1])} at the end"
        return f"{self.show(best)} at {self.x_label} {at:g}{last}"

    def _colour(self, letter: str) -> str | None:
        return COLOURS[LETTERS.index(letter) % len(COLOURS)] if letter in LETTERS else None


def _range(curves: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Of the values after the first quarter of each curve, or of all where these are equal."""
    values = [y for points in curves for _, y in points[len(points) // 4 :]]
    if values and min(values) < max(values):
        return min(values), max(values)
    values = [y for points in curves for _, y in points] or [0.0]
    return min(values), max(values)


def _value_at(points: Sequence[Point], column: int, columns: int, last: float) -> float | None:
    """The value of a curve, on a straight line between two points; None where it hasn't begun or has ended."""
    step = last / (columns - 1)
    x = column * step
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    near = [y for at, y in points if math.floor(at / step + 0.5) == column]  # a curve may end between two columns
    return near[-1] if near else None
