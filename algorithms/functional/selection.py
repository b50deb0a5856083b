"""Best-of-N, voting, accuracies, calibration and ProcessBench (arXiv 2412.06559); numpy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from algorithms.functional.advantages import Bool, Float64, Int64, Ragged, members_of_groups


def best_of_n(scores: Float64) -> int:
    """Index of the largest of the scores [N]; ties go to the earlier one. Raise ValueError for none or NaN."""
    if len(scores) == 0 or np.isnan(scores).any():
        raise ValueError(f"best of {len(scores)} responses needs at least one score and no NaN")
    return int(np.argmax(scores))


def vote(answers: Sequence[Hashable | None], weights: Float64) -> int:
    """Index of the first response that gives the answer with the largest summed weights [N]; ties go to the earlier
    answer.

    An answer of None gets no vote; if all are None, the first response wins.
    """
    totals: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + float(weight)
    if not totals:
        return 0
    return list(answers).index(max(totals, key=lambda answer: totals[answer]))


def majority(answers: Sequence[Hashable | None]) -> int:
    return vote(answers, np.ones(len(answers)))


def sigmoid(scores: Float64) -> Float64:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(scores, dtype=np.float64))))


def subsets(responses: int, n: int, limit: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Yield all subsets of n responses in ascending order, or `limit` random ones if there are more."""
    if math.comb(responses, n) <= limit:
        yield from combinations(range(responses), n)
        return
    rng = np.random.default_rng(seed)
    for _ in range(limit):
        yield tuple(sorted(rng.choice(responses, n, replace=False).tolist()))


def pair_accuracy(scores: Float64, labels: Float64, group: Int64, valid: Bool) -> Float64:
    """Per group with two valid samples: the share of (better, worse) pairs that `scores` order correctly.

    scores, labels, group, valid [B]; pairs are weighted by their labels' difference, equal scores count half. A group
    whose labels are all equal counts 0.5, as in the official code.
    """
    shares = []
    for members in members_of_groups(valid, group):
        gap = np.clip(labels[members][:, None] - labels[members][None, :], 0.0, None)
        margin = scores[members][:, None] - scores[members][None, :]
        right = (margin > 0) + 0.5 * (margin == 0)
        shares.append(float((gap * right).sum() / gap.sum()) if gap.any() else 0.5)
    return np.array(shares, dtype=np.float64)


def sign_accuracy(scores: Float64, labels: Float64, valid: Bool) -> float:
    """Share of valid samples with s > 0 for labels above 0.5, else s < 0; s = 0 is wrong. NaN without any."""
    if not valid.any():
        return float("nan")
    return float((scores[valid] * np.where(labels[valid] > 0.5, 1.0, -1.0) > 0).mean())


def brier(scores: Float64, labels: Float64) -> float:
    """Mean (sigma(s) - label)^2 over samples [B]."""
    return float(((sigmoid(scores) - labels) ** 2).mean())


def calibration_error(scores: Float64, labels: Float64, bins: int = 10) -> float:
    """|mean sigma(s) - mean label| in equal bins of sigma(s), weighted by their samples (arXiv 1706.04599 eq. 3)."""
    return expected_calibration_error(sigmoid(scores), labels, bins)


def expected_calibration_error(predicted: Float64, labels: Float64, bins: int = 10) -> float:
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    gaps = [abs(float((predicted - labels)[index == b].sum())) for b in np.unique(index)]
    return sum(gaps) / len(labels)


NO_ERROR = -1
"""Label and prediction of a response with no wrong step."""
_MOST_THRESHOLDS = 2000


@dataclass(frozen=True, slots=True)
class ProcessBench:
    threshold: float
    error_accuracy: float
    """Share of responses with a wrong step whose first wrong step was predicted; NaN if there are none."""
    correct_accuracy: float
    """Share of responses without a wrong step that were predicted as such; NaN if there are none."""

    @property
    def f1(self) -> float:
        total = self.error_accuracy + self.correct_accuracy
        return 2 * self.error_accuracy * self.correct_accuracy / total if total else 0.0


def first_errors(cumulative: Ragged, threshold: float) -> Int64:
    """[B] the first step k with sigma(c_k) < threshold, else -1; `cumulative` ragged [S_i]."""
    first = []
    for row in cumulative:
        below = sigmoid(row) < threshold
        first.append(int(np.argmax(below)) if below.any() else NO_ERROR)
    return np.array(first, dtype=np.int64)


def process_bench(cumulative: Ragged, labels: Int64, threshold: float) -> ProcessBench:
    """Score the predictions; labels [B]: first wrong step, counted from 0, or -1 for none."""
    right = first_errors(cumulative, threshold) == labels
    wrong_step = labels != NO_ERROR
    return ProcessBench(threshold, _mean(right[wrong_step]), _mean(right[~wrong_step]))


def best_threshold(cumulative: Ragged, labels: Int64) -> ProcessBench:
    """The result with the highest F1 over thresholds halfway between neighbouring sigma(c), evenly thinned to at most
    2000; ties go to the lowest."""
    values = np.unique(np.concatenate([sigmoid(row) for row in cumulative]))
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
    """[B, longest] running minimum of sigma(c), rows padded with their last value."""
    longest = max(len(row) for row in cumulative)
    lowest = [np.minimum.accumulate(sigmoid(row)) for row in cumulative]
    return np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in lowest])


def _mean(right: np.ndarray) -> float:
    return float(right.mean()) if len(right) else float("nan")
