"""Small drawings in text: durations, sparklines, a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-~=+*#"
_NARROWEST_CURVE = 30


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07 min`, `2:03:07 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def printable(text: str) -> str:
    """One line without control characters: a model's output must not steer the terminal."""
    spaced = " ".join(text.split())
    return "".join(c if c.isprintable() else "�" for c in spaced)


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The values as bars, averaged into at most `width` of them; values that are not finite leave a gap."""
    bars = _ASCII_BARS if ascii_only else _BARS
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = []
    for start, end in pairwise(edges):
        finite = [v for v in values[start:end] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [m for m in means if not math.isnan(m)]
    if not known:
        return " " * count
    low, high = min(known), max(known)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(m) else bars[round((m - low) * scale)] for m in means)


def curve(points: Sequence[tuple[int, float]], width: int, height: int, ascii_only: bool = False) -> list[str]:
    """Lines of a plot of shares (0 to 1) over steps: measured points, joined by dots; empty if that is no curve."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2 or points[0][0] == points[-1][0] or width < _NARROWEST_CURVE:
        return []
    mark, dot, axis, corner, floor = ("o", ".", "|", "+", "-") if ascii_only else ("●", "·", "┤", "└", "─")
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high - low < 0.01:
        middle = min(max((low + high) / 2, 0.005), 0.995)
        low, high = middle - 0.005, middle + 0.005
    columns = width - 9
    first, last = points[0][0], points[-1][0]
    grid = [[" "] * columns for _ in range(height)]

    def row(y: float) -> int:
        return round((high - y) / (high - low) * (height - 1))

    def column(x: float) -> int:
        return round((x - first) / (last - first) * (columns - 1))

    for (x0, y0), (x1, y1) in pairwise(points):
        for c in range(column(x0), column(x1) + 1):
            share = (c - column(x0)) / max(column(x1) - column(x0), 1)
            grid[row(y0 + share * (y1 - y0))][c] = dot
    for x, y in points:
        grid[row(y)][column(x)] = mark
    lines = []
    for r, cells in enumerate(grid):
        labelled = r in (0, height - 1, (height - 1) // 2)
        label = f"{high - (high - low) * r / (height - 1):6.1%}" if labelled else " " * 6
        lines.append(f"{label:>7} {axis}{''.join(cells)}".rstrip())
    lines.append(" " * 8 + corner + floor * columns)
    left, right = f"step {first}", f"step {last}"
    lines.append(" " * 9 + left + right.rjust(columns - len(left)))
    return lines
