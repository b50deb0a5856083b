"""Statistics of all rewards so far, and the transforms that use them (PAR's code, baselines of arXiv 2502.18770)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rewards.shaping.references import Float64


@dataclass
class RunningStatistics:
    """Count, mean, sum of squared differences, least and greatest; batches are merged exactly (Chan et al.)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, values: Float64) -> None:
        """Count a batch [n] of finite values; an empty one changes nothing."""
        n = len(values)
        if n == 0:
            return
        total, batch_mean = self.count + n, float(np.mean(values))
        difference = batch_mean - self.mean
        self.mean += difference * n / total
        self.squares += float(np.sum((values - batch_mean) ** 2)) + difference**2 * self.count * n / total
        self.least, self.greatest = min(self.least, float(np.min(values))), max(self.greatest, float(np.max(values)))
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation (ddof=0); 0 before there are two values."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, float]:
        """Everything needed to go on later."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The reverse of state_dict."""
        self.count = int(state["count"])
        self.mean, self.squares = float(state["mean"]), float(state["squares"])
        self.least, self.greatest = float(state["least"]), float(state["greatest"])


def standardised(values: Float64, statistics: RunningStatistics) -> Float64:
    """(r - mean) / std [n]; only centred while all values were equal, unchanged before there are statistics."""
    if statistics.count == 0:
        return values
    return (values - statistics.mean) / (statistics.std or 1.0)


def clipped_to_std(values: Float64, statistics: RunningStatistics, width: float = 1.0) -> Float64:
    """r clipped to mean +- width * std [n]; unchanged before there are statistics."""
    if statistics.count == 0:
        return values
    room = width * statistics.std
    return np.clip(values, statistics.mean - room, statistics.mean + room)


def min_max(values: Float64, statistics: RunningStatistics) -> Float64:
    """(r - least) / (greatest - least) [n]; 0 while all values were equal, unchanged before there are statistics."""
    if statistics.count == 0:
        return values
    return (values - statistics.least) / ((statistics.greatest - statistics.least) or 1.0)
