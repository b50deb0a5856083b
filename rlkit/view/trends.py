"""Slopes, differences and correlations with intervals of 95 %. Pure functions of numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Points = Sequence[tuple[int, float]]
LEAST_POINTS = 5
_T975 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip
"""Quantile 0.975 of Student's t; between two rows the larger one."""


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


@dataclass(frozen=True)
class Together:
    """Slopes of two metrics over the same steps, per 100 steps."""

    first: Interval
    second: Interval
    start: int
    end: int


def t975(freedom: int) -> float:
    rows = [rows for rows in _T975 if rows <= freedom]
    return _T975[max(rows)] if rows else math.inf


def slope(x: np.ndarray, y: np.ndarray) -> Interval | None:
    """Least squares; None with fewer than three points or equal x.

    The residuals of a training run are correlated: the variance is multiplied by (1 + r) / (1 - r), r their correlation
    at lag one where it is positive.
    """
    n = len(x)
    if n < 3 or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    spread = float(centred @ centred)
    value = float(centred @ (y - y.mean())) / spread
    rest = y - y.mean() - value * centred
    size = float(rest @ rest)
    lag = float(rest[1:] @ rest[:-1]) / size if size > 0 else 0.0
    inflation = (1 + lag) / (1 - lag) if 0 < lag < 1 else 1.0
    error = math.sqrt(size / (n - 2) / spread * inflation)
    return Interval(value, value - t975(n - 2) * error, value + t975(n - 2) * error)


def together(first: Points, second: Points, share: float = 1 / 3) -> Together | None:
    """Slopes of both over the last `share` of the steps (at least `LEAST_POINTS` points of the one with fewer)."""
    if len(first) < LEAST_POINTS or len(second) < LEAST_POINTS:
        return None
    last = max(first[-1][0], second[-1][0])
    begin = min(first[0][0], second[0][0])
    start = min(last - share * (last - begin), *(points[-LEAST_POINTS][0] for points in (first, second)))
    slopes = []
    for points in (first, second):
        chosen = np.array([(step, value) for step, value in points if step >= start], dtype=np.float64)
        one = slope(chosen[:, 0] / 100, chosen[:, 1])
        if one is None:
            return None
        slopes.append(one)
    return Together(slopes[0], slopes[1], math.ceil(start), last)


def mean_difference(differences: np.ndarray) -> Interval | None:
    """Of pairs; None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    value, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    return Interval(value, value - t975(n - 1) * error, value + t975(n - 1) * error)


def correlation(x: np.ndarray, y: np.ndarray) -> Interval | None:
    """Pearson's, with Fisher's interval; None for fewer than ten pairs or where one does not vary. NaN are left out."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 10 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    z, half = math.atanh(np.clip(r, -0.999999, 0.999999)), 1.96 / math.sqrt(len(x) - 3)
    return Interval(r, math.tanh(z - half), math.tanh(z + half))
