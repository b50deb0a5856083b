"""Which responses of a group are compared, and how certain their order is (numpy).

Scores are those of one group's responses [N]; pairs are (better, worse) indices into the group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from algorithms.functional.advantages import Bool, Float64, Int64
from rlkit.experience import Group, PreferencePair

Pairs = list[tuple[int, int]]
Pairing = Literal["auto", "judge", "best_worst", "all", "adjacent"]


def best_worst(scores: Float64) -> Pairs:
    """Pair the best with the worst, ties going to the earlier; none if all are equal."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return [(best, worst)] if scores[best] > scores[worst] else []


def all_unequal(scores: Float64) -> Pairs:
    return [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]


def all_pairs(scores: Float64) -> Pairs:
    """All pairs, including ties in their order of appearance."""
    return [(i, j) for i in range(len(scores)) for j in range(len(scores)) if (scores[i], j) > (scores[j], i)]


def adjacent(scores: Float64) -> Pairs:
    """Neighbours in the ranking, unless their scores are equal; ties are ranked in their order of appearance."""
    ranking = np.argsort(-scores, kind="stable").tolist()
    return [(i, j) for i, j in pairwise(ranking) if scores[i] > scores[j]]


def kendall_tau(first: Float64, second: Float64) -> float:
    """(concordant - discordant pairs) / all pairs of two scorings [N]; ties count as 0. Raise ValueError if N < 2."""
    n = len(first)
    if n < 2:
        raise ValueError("a rank correlation needs two scores")
    signs = np.sign(first[:, None] - first) * np.sign(second[:, None] - second)
    return float(signs.sum()) / (n * (n - 1))


def consistency(first: Float64, second: Float64) -> float:
    """CREAM's C = (tau + 1) / 2 of two scorings [N] (arXiv 2410.12735): the probability that a label is right."""
    return (kendall_tau(first, second) + 1) / 2


def dynamic_beta(gain: Float64, beta: float, weight: float = 0.5, rate: float = 0.5) -> Float64:
    """beta (1 + w (1 - exp(-k max(d, 0)))), d = r_w - r_l of an external reward [P] (MM-DPO, arXiv 2502.10391)."""
    return np.asarray(beta * (1 + weight * (1 - np.exp(-rate * np.maximum(gain, 0.0)))))


BY_SCORE: Mapping[Pairing, Callable[[Float64], Pairs]] = {
    "auto": best_worst,
    "best_worst": best_worst,
    "all": all_unequal,
    "adjacent": adjacent,
}


@dataclass(frozen=True)
class Compared:
    """The P pairs of a step's B samples, group by group."""

    samples: Int64
    """[P, 2] (better, worse)"""
    probability: Float64
    """[P] probability that the better one is better, at least 1/2; 1 where scores decide."""
    gain: Float64
    """[P] the recorded margin, else the difference of the scores."""
    margin: Float64
    """[P] the recorded margin, else 0."""
    weight: Float64
    """[P] the recorded weight; where scores decide, the mean weight of the two responses."""

    @classmethod
    def of(cls, groups: Sequence[Group], scores: Float64, valid: Bool, how: Pairing, ties: bool = False) -> Compared:
        """Pair the samples; `scores`, `valid` [B]. judge: by the preferences in `GroupScores.pairs`; auto: by these
        where a group has any. `ties`: all also pairs equal scores.

        Pairs with an invalid sample are left out.
        """
        pairs_of = all_pairs if how == "all" and ties else BY_SCORE.get(how)
        rows: list[tuple[int, int, PreferencePair]] = []
        weights = [sample.weight for group in groups for sample in group.samples]
        start = 0
        for group in groups:
            stated = group.scores.pairs if group.scores is not None and how in ("auto", "judge") else ()
            members = start + np.flatnonzero(valid[start : start + len(group.samples)])
            if stated:
                rows += [(start + pair.winner, start + pair.loser, pair) for pair in map(_likelier_first, stated)]
            elif pairs_of is not None and len(members) > 1:
                pairs = [(members[i], members[j]) for i, j in pairs_of(scores[members])]
                rows += [(i, j, PreferencePair(0, 1, weight=(weights[i] + weights[j]) / 2)) for i, j in pairs]
            start += len(group.samples)
        rows = [row for row in rows if valid[row[0]] and valid[row[1]]]
        samples = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        stated_values = np.array([(p.probability, p.margin, p.weight) for _, _, p in rows], np.float64).reshape(-1, 3)
        probability, margin, weight = stated_values.T  # None becomes NaN here
        gain = np.where(np.isnan(margin), scores[samples[:, 0]] - scores[samples[:, 1]], margin)
        return cls(samples, probability, gain, np.nan_to_num(margin), weight)

    def where(self, chosen: Bool) -> Compared:
        return Compared(
            self.samples[chosen], self.probability[chosen], self.gain[chosen], self.margin[chosen], self.weight[chosen]
        )


def _likelier_first(pair: PreferencePair) -> PreferencePair:
    if pair.probability >= 0.5:
        return pair
    margin = None if pair.margin is None else -pair.margin
    return PreferencePair(pair.loser, pair.winner, 1 - pair.probability, margin, pair.weight)
