"""Statistics of the numbers and words of many samples: slopes, differences and correlations with 95 % intervals, shares
of variance, phrases of the best answers. Pure functions; arrays have one entry per sample."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.experience.statistics import student_t

Points = Sequence[tuple[int, float]]
LEAST_POINTS = 5
SHORTEST, LONGEST = 2, 6
"""Fewest and most words of a phrase."""
LEAST_Z = 3.0
LEAST_SHARE = 0.1
"""Smallest share of the best answers that must have a phrase; a rarer one is not a habit."""
PRIOR = 10.0
"""Weight of the prior from the first answers, in answers; a phrase that they lack counts as one answer."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


@dataclass(frozen=True)
class Together:
    """How much two metrics change over the same steps, by straight lines fitted to them."""

    first: Interval
    second: Interval
    start: int
    end: int


def _around(value: float, error: float, freedom: int) -> Interval:
    half = student_t(freedom) * error
    return Interval(value, value - half, value + half)


def _inflation(rest: np.ndarray) -> float:
    """Return the factor by which autocorrelation of neighbouring steps increases the variance: (1 + r) / (1 - r), where
    r is the correlation at lag one, if positive."""
    size = float(rest @ rest)
    lag = float(rest[1:] @ rest[:-1]) / size if size > 0 else 0.0
    return (1 + lag) / (1 - lag) if 0 < lag < 1 else 1.0


def slope(x: np.ndarray, y: np.ndarray) -> Interval | None:
    """Fit a slope over steps by least squares; None with fewer than three points or if all x are equal."""
    n = len(x)
    if n < 3 or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    spread = float(centred @ centred)
    value = float(centred @ (y - y.mean())) / spread
    rest = y - y.mean() - value * centred
    return _around(value, math.sqrt(float(rest @ rest) / (n - 2) / spread * _inflation(rest)), n - 2)


def together(first: Points, second: Points, share: float = 1 / 3) -> Together | None:
    """Return the changes of both over the last `share` of the steps (at least `LEAST_POINTS` points of each)."""
    if len(first) < LEAST_POINTS or len(second) < LEAST_POINTS:
        return None
    last, begin = max(first[-1][0], second[-1][0]), min(first[0][0], second[0][0])
    start = min(last - share * (last - begin), *(points[-LEAST_POINTS][0] for points in (first, second)))
    chosen = [
        np.array([point for point in points if point[0] >= start], dtype=np.float64) for points in (first, second)
    ]
    if last == start:
        return None
    one, other = (slope(points[:, 0] / (last - start), points[:, 1]) for points in chosen)
    return None if one is None or other is None else Together(one, other, math.ceil(start), last)


def mean_difference(differences: np.ndarray, of_steps: bool = False) -> Interval | None:
    """Return the mean difference of pairs; None for fewer than two. `of_steps`: steps in order, thus autocorrelated."""
    n = len(differences)
    if n < 2:
        return None
    value, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    if of_steps and n >= 4:
        error *= math.sqrt(_inflation(differences - value))
    return _around(value, error, n - 1)


def correlation(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> Interval | None:
    """Return Pearson's correlation; None for fewer than ten groups or if x or y does not vary. NaN are left out.

    `group`: number of each pair's group. Pairs in a group may depend on each other: minus their group's mean, two
    answers count as one. The interval is Fisher's, but its standard error is that of the groups' sums of influence
    values, x y - r (x^2 + y^2) / 2 for standardised x and y (Hampel 1974), instead of 1 / sqrt(n - 3).
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y, group = x[known], y[known], group[known]
    sizes = np.bincount(group)
    groups = int(np.count_nonzero(sizes))
    if groups < 10 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = ((values - values.mean()) / values.std() for values in (x, y))
    r = float(np.clip(np.mean(x * y), -0.999999, 0.999999))
    sums = np.bincount(group, x * y - r / 2 * (x * x + y * y))
    error = math.sqrt(float(sums @ sums) * groups / (groups - 1)) / len(x)
    z, half = math.atanh(r), student_t(groups - 1) * error / (1 - r * r)
    return Interval(r, math.tanh(z - half), math.tanh(z + half))


def within_groups(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return values minus the mean of their group's known values; `group`: number of each sample's group."""
    known = np.isfinite(values)
    sums = np.bincount(group, np.where(known, values, 0.0))
    counts = np.bincount(group, known)
    return values - (sums / np.maximum(counts, 1))[group]


def without(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the residuals of `values` regressed on `other`, both of mean 0. NaN where either is NaN."""
    known = np.isfinite(values) & np.isfinite(other)
    size = float(other[known] @ other[known])
    return values - (float(other[known] @ values[known]) / size * other if size > 0 else 0.0 * other)


def spread_shares(contributions: Mapping[str, np.ndarray], group: np.ndarray) -> dict[str, float]:
    """Return each part's share of the variance of the summed reward within groups: cov(part, sum) / var(sum).

    The shares sum to 1. A part with a negative share works against the others. Empty if no group has any spread.
    """
    inner = {name: within_groups(np.nan_to_num(values), group) for name, values in contributions.items()}
    total = np.sum(list(inner.values()), axis=0)
    variance = float(total @ total)
    return {name: float(values @ total) / variance for name, values in inner.items()} if variance > 1e-12 else {}


def last_token_share(process: Sequence[np.ndarray]) -> float | None:
    """Return the mean share of a sample's process credit on its last token; samples without credit are left out."""
    shares = [abs(own[-1]) / total for own in process if len(own) and (total := float(np.abs(own).sum())) > 0]
    return float(np.mean(shares)) if shares else None


@dataclass(frozen=True)
class Phrase:
    """A sequence of words, and the shares of the best, worst and first answers that contain it."""

    words: tuple[str, ...]
    z: float
    """Log-odds in standard deviations."""
    best: float
    worst: float
    before: float

    @property
    def text(self) -> str:
        return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(self.words))


def boilerplate(best: Sequence[str], worst: Sequence[str], before: Sequence[str], most: int = 5) -> list[Phrase]:
    """Return rewarded boilerplate: phrases of the best-rewarded answers that the worst and the first rarely have.

    Ranked by the log-odds of best against worst answers, with a Dirichlet prior from those `before` (Monroe, Colaresi
    and Quinn 2008, "Fightin' Words"; counting documents instead of words). A phrase counts once per answer. All numbers
    count as the same word. Of overlapping phrases, the strongest is kept, or the longest of equally strong ones.
    """
    if not best or not worst:
        return []
    answers = (best, worst, before)
    top = _counts(best)
    often = (words for words, count in top.items() if count >= LEAST_SHARE * len(best))
    candidates = {words for words in often if any(word.isalpha() for word in words)}
    counts = [top, _counts(worst, candidates), _counts(before, candidates)]
    found = []
    for words in candidates:
        shares = [own[words] / max(1, len(texts)) for own, texts in zip(counts, answers, strict=True)]
        z = _log_odds(counts[0][words], len(best), counts[1][words], len(worst), shares[2])
        if z >= LEAST_Z and shares[0] > 2 * shares[2]:
            found.append(Phrase(words, z, *shares))
    found.sort(key=lambda one: (-round(one.z, 1), -sum(word.isalnum() for word in one.words), one.words))
    chosen: list[Phrase] = []
    for phrase in found:
        if len(chosen) < most and not any(_overlap(phrase.words, other.words) for other in chosen):
            chosen.append(phrase)
    return chosen


def has(text: str, phrase: Phrase) -> bool:
    """Whether an answer contains the phrase."""
    return phrase.words in _parts(_words(text), len(phrase.words))


def _words(text: str) -> list[str]:
    return ["0" if word.isdecimal() else word.lower() for word in _WORD.findall(text)]


def _parts(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """Return the sequences of n words."""
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _counts(texts: Sequence[str], among: set[tuple[str, ...]] | None = None) -> Counter[tuple[str, ...]]:
    """Count the texts that contain each sequence of words within a sentence; `among`: count only these sequences."""
    known: dict[str, set[tuple[str, ...]]] = {}  # models repeat themselves
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        sentences = set(_SENTENCE.split(text))
        for sentence in sentences - known.keys():
            words = _words(sentence)
            found = set().union(*(_parts(words, n) for n in range(SHORTEST, LONGEST + 1)))
            known[sentence] = found if among is None else found & among
        counts.update(set().union(*(known[sentence] for sentence in sentences)))
    return counts


def _log_odds(top: int, tops: int, bottom: int, bottoms: int, prior: float) -> float:
    """Return z of the difference between two log-odds, adding `PRIOR` answers with the share `prior` to each."""
    added = min(max(PRIOR * prior, 1.0), PRIOR - 1.0)
    yes, no = np.array([top, bottom]) + added, np.array([tops - top, bottoms - bottom]) + PRIOR - added
    odds = np.log(yes / no)
    return float((odds[0] - odds[1]) / np.sqrt((1 / yes + 1 / no).sum()))


def _overlap(words: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether both are parts of one sentence: over half of the shorter one's words are in the other in this order."""
    n = min(len(words), len(other)) // 2 + 1
    return not _parts(words, n).isdisjoint(_parts(other, n))
