"""ProcessBench (arXiv 2412.06559): does a process reward find the first wrong step? numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from algorithms.advantages import Float64, Int64
from algorithms.best_of_n import vote_weights
from algorithms.returns import Ragged

NO_ERROR = -1
"""Label and prediction for a response whose steps are all right."""
_MOST_THRESHOLDS = 2000


@dataclass(frozen=True, slots=True)
class ProcessBench:
    """Result at one threshold."""

    threshold: float
    error_accuracy: float
    """Share of responses with a wrong step whose first wrong step was found; NaN without such responses."""
    correct_accuracy: float
    """Share of responses without a wrong step in which none was found; NaN without such responses."""

    @property
    def f1(self) -> float:
        """Harmonic mean of the two."""
        total = self.error_accuracy + self.correct_accuracy
        return 2 * self.error_accuracy * self.correct_accuracy / total if total else 0.0


def first_errors(cumulative: Ragged, threshold: float) -> Int64:
    """[B] first step k with sigma(c_k) < threshold, else -1; `cumulative` is ragged [S_i], one row per response."""
    found = []
    for row in cumulative:
        below = vote_weights(row) < threshold
        found.append(int(np.argmax(below)) if below.any() else NO_ERROR)
    return np.array(found, dtype=np.int64)


def process_bench(cumulative: Ragged, labels: Int64, threshold: float) -> ProcessBench:
    """Accuracies at a threshold; labels [B]: first wrong step counted from 0, -1 if all are right."""
    right = first_errors(cumulative, threshold) == labels
    wrong_step = labels != NO_ERROR
    return ProcessBench(threshold, _mean(right[wrong_step]), _mean(right[~wrong_step]))


def best_threshold(cumulative: Ragged, labels: Int64) -> ProcessBench:
    """The result with the highest F1 over thresholds (the lowest such threshold): halfway between neighbouring values
    of sigma(c), at most 2000 of them, evenly thinned.

    The F1 it reports is that of the data it was tuned on: use the threshold on others for an honest one.
    """
    values = np.unique(np.concatenate([vote_weights(row) for row in cumulative]))
    between: Sequence[float] = [float(values[0]), *((values[1:] + values[:-1]) / 2).tolist(), float(values[-1]) + 1e-9]
    if len(between) > _MOST_THRESHOLDS:
        between = [between[i] for i in np.linspace(0, len(between) - 1, _MOST_THRESHOLDS).astype(int)]
    lowest = _prefix_minima(cumulative)
    best: ProcessBench | None = None
    wrong_step = labels != NO_ERROR
    for threshold in between:
        above = (lowest >= threshold).sum(axis=1)
        predicted = np.where(above == lowest.shape[1], NO_ERROR, above)
        right = predicted == labels
        result = ProcessBench(float(threshold), _mean(right[wrong_step]), _mean(right[~wrong_step]))
        if best is None or result.f1 > best.f1:
            best = result
    assert best is not None
    return best


def _prefix_minima(cumulative: Ragged) -> Float64:
    """[B, longest] smallest sigma(c) so far, rows filled up with their last: never below a threshold in all columns
    means no error, else the number of columns that are not below it is the first step that is."""
    longest = max(len(row) for row in cumulative)
    lowest = [np.minimum.accumulate(vote_weights(row)) for row in cumulative]
    return np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in lowest])


def _mean(right: np.ndarray) -> float:
    return float(right.mean()) if len(right) else float("nan")
