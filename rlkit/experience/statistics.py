"""Estimates, intervals and comparisons from the values of several answers to several questions; numpy only.

A value is 1 (right) or 0 (wrong), a share, or a reward. Nothing here depends on the order of answers or questions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating]
LEVEL = 0.95
"""Confidence level of every interval."""
Z = 1.959963984540054
"""Standard deviations to each side of the mean that contain 95 % of a normal distribution."""
FEW_QUESTIONS = 30
"""Below this number the interval of a mean comes from resampled questions."""
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions with its 95 % interval."""

    value: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True, slots=True)
class Difference:
    """The second answers' values minus the first's, on the same questions."""

    mean: Estimate
    better: int
    """Questions on which the second answers are better."""
    worse: int
    p: float
    """p of the sign test: how likely so uneven a split would be if better and worse were equally likely."""

    @property
    def winner(self) -> str | None:
        """`second` or `first`; None if the interval contains 0, or if there are too few questions to show a spread (one
        question has no interval)."""
        low, high = self.mean.low, self.mean.high
        if low == high and self.p > 1 - LEVEL:
            return None
        return "second" if low > 0 else "first" if high < 0 else None


# -- several answers to one question -----------------------------------------------------------------------------------


def expected_choice(values: Values, scores: Values, k: int) -> float:
    """Return the expected value of the highest-scored of k of the n answers [n], drawn without replacement.

    Equal scores are equally likely to be chosen. Raises ValueError if k > n.
    """
    n = len(values)
    if k > n:
        raise ValueError(f"the best of {k} responses needs at least {k}; there are {n}")
    order = np.argsort(scores, kind="stable")
    _, starts = np.unique(np.asarray(scores)[order], return_index=True)
    bounds = [*starts.tolist(), n]
    # Of the C(n, k) subsets, C(end, k) lie wholly before `end` in order of score.
    return sum(
        (math.comb(end, k) - math.comb(start, k)) / math.comb(n, k) * float(np.mean(np.sort(values[order[start:end]])))
        for start, end in pairwise(bounds)
    )


def expected_best(values: Values, k: int) -> float:
    """Return the expected maximum of k of the values [n], drawn without replacement. Raises ValueError if k > n.

    For zeros and ones it is the unbiased pass@k, 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1).
    """
    return expected_choice(values, values, k)


def expected_worst(values: Values, k: int) -> float:
    """Return the expected minimum; for zeros and ones pass^k, C(c, k) / C(n, k): all k right (arXiv 2406.12045)."""
    return -expected_best(-np.asarray(values), k)


def expected_majority(answers: Sequence[Hashable | None], values: Values, k: int) -> float:
    """Return the expected value of the answer that most of k of the n answers agree on (maj@k, arXiv 2203.11171).

    Ties are broken at random; None does not vote, and if all are None, any of them is taken. Exact: it counts subsets
    by size, by how many answers share the most votes `a`, and by their value. Raises ValueError if k > n.
    """
    n = len(values)
    if k > n:
        raise ValueError(f"the majority of {k} responses needs at least {k}; there are {n}")
    worth: dict[Hashable, list[float]] = {}
    for answer, value in zip(answers, values.tolist(), strict=True):
        worth.setdefault(answer, []).append(value)
    silent = worth.pop(None, [])
    total = math.comb(len(silent), k) * (math.fsum(silent) / len(silent) if silent else 0.0)
    for a in range(1, min(k, max(map(len, worth.values()), default=0)) + 1):
        counts, sums = np.zeros((k + 1, k // a + 1)), np.zeros((k + 1, k // a + 1))
        counts[0, 0] = 1.0
        counts = _extended(counts, len(silent), k)
        for members in sorted(worth.values()):
            size, mean = len(members), math.fsum(members) / len(members)
            more, more_sums = _extended(counts, size, a - 1), _extended(sums, size, a - 1)
            if a <= size:
                ways = math.comb(size, a)
                more[a:, 1:] += ways * counts[:-a, :-1]
                more_sums[a:, 1:] += ways * (sums + mean * counts)[:-a, :-1]
            counts, sums = more, more_sums
        total += float((sums[k, 1:] / np.arange(1, k // a + 1)).sum())
    return total / math.comb(n, k)


def _extended(table: np.ndarray, size: int, most: int) -> np.ndarray:
    """Return the numbers of subsets [answers, ties] with up to `most` of `size` further answers added."""
    extended = table.copy()
    for taken in range(1, min(size, most, len(table) - 1) + 1):
        extended[taken:] += math.comb(size, taken) * table[:-taken]
    return extended


def best_sizes(samples: int) -> list[int]:
    """Return 2, 4, 8, ... and the number of samples itself: the values of k for pass@k and similar metrics."""
    powers = [2**i for i in range(1, samples.bit_length())]
    return [k for k in powers if k < samples] + ([samples] if samples > 1 else [])


# -- two rewards on the same answers -----------------------------------------------------------------------------------


def correlation(first: Values, second: Values) -> float:
    """Return Pearson's correlation; NaN if one of the two is constant."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def ranks(values: Values) -> Values:
    """Return ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], dtype=np.float64)


def agreement(pairs: Sequence[tuple[Values, Values]]) -> float:
    """Return the share of pairs of answers to one question that both rewards order alike, among pairs that neither
    ties. `pairs`: by question, the values of its answers under one and under the other. NaN without such a pair."""
    alike = total = 0
    for one, other in pairs:
        upper = np.triu_indices(len(one), 1)
        product = np.sign(np.subtract.outer(one, one)[upper]) * np.sign(np.subtract.outer(other, other)[upper])
        alike, total = alike + int((product > 0).sum()), total + int((product != 0).sum())
    return alike / total if total else math.nan


# -- several questions -------------------------------------------------------------------------------------------------


def mean_of_questions(means: Sequence[float] | Values, share: bool = False) -> Estimate:
    """Return the mean of the questions' values [Q] with an interval clustered by question: answers to one question are
    not independent, the questions are (arXiv 2411.00640).

    Student's t on their spread; below 30 questions, percentiles of resampled means, widened as t would be (Hesterberg
    2015, doi 10.1080/00031305.2015.1089789, "expanded percentile"). Wilson's interval where a `share` has no spread
    (all right, for example); NaN for one question.
    """
    values = np.sort(np.asarray(means, dtype=np.float64))
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    if share and values[0] == values[-1]:
        return Estimate(mean, *wilson(mean * count, count), count)
    quantile = student_t(count - 1)
    if count < FEW_QUESTIONS:
        return Estimate(mean, *_resampled(values, quantile), count)
    error = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    low, high = (max(0.0, mean - error), min(1.0, mean + error)) if share else (mean - error, mean + error)
    return Estimate(mean, low, high, count)


def _resampled(values: Values, quantile: float) -> tuple[float, float]:
    count = len(values)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    tail = 0.5 * math.erfc(quantile * math.sqrt(count / (count - 1)) / math.sqrt(2))
    low, high = np.quantile(draws @ values / count, (tail, 1 - tail))
    return float(low), float(high)


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Compare the values (question -> value) of the questions that both have. Raises ValueError if there are none."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("no question was answered by both")
    differences = [second[question] - first[question] for question in shared]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Difference(mean_of_questions(differences), better, worse, sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p of an exact sign test; ties are left out."""
    trials = better + worse
    ways = sum(math.comb(trials, i) for i in range(max(better, worse), trials + 1))
    return min(1.0, float(2 * ways / 2**trials))


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), valid for rare events, too."""
    share, spread = successes / trials, Z**2 / trials
    middle = share + spread / 2
    width = (spread * (share * (1 - share) + spread / 4)) ** 0.5
    return max(0.0, (middle - width) / (1 + spread)), min(1.0, (middle + width) / (1 + spread))


@lru_cache
def student_t(degrees: int) -> float:
    """Return the t with 95 % of Student's distribution between -t and t."""
    low, high = 0.0, 16.0  # 12.7 with one degree of freedom
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < LEVEL else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """Return the probability of [-t, t]: finite series of Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    steps = np.arange(1, (degrees - odd) // 2)
    factors = (2 * steps - 1 + odd) / (2 * steps + odd) * math.cos(angle) ** 2
    series = 1.0 + float(np.cumprod(factors).sum())
    if not odd:
        return math.sin(angle) * series
    return 2 / math.pi * (angle + (math.sin(angle) * math.cos(angle) * series if degrees > 1 else 0.0))
