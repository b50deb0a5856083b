"""Which responses of a group are compared, and how much their order is worth (numpy).

Scores are of one group's responses [N]; pairs are (better, worse) indices into it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from algorithms.functional.advantages import Float64

Pairs = list[tuple[int, int]]


def best_worst(scores: Float64) -> Pairs:
    """The best against the worst, ties to the earlier; none if all are equal."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return [(best, worst)] if scores[best] > scores[worst] else []


def all_unequal(scores: Float64) -> Pairs:
    return [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]


def adjacent(scores: Float64) -> Pairs:
    """Neighbours in the ranking, where they differ; ties in their order."""
    ranking = np.argsort(-scores, kind="stable").tolist()
    return [(i, j) for i, j in pairwise(ranking) if scores[i] > scores[j]]


def kendall_tau(first: Float64, second: Float64) -> float:
    """(concordant - discordant pairs) / all pairs of two scorings [N]; ties count 0. Raise ValueError if N < 2."""
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
