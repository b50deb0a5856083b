"""Choosing one of several responses to a prompt: best-of-N, majority and weighted votes; numpy, one prompt at a time.

Scores may come from any reward; `answers` are the final answers found in the responses, None where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations

import numpy as np

from algorithms.advantages import Float64


def best_of_n(scores: Float64) -> int:
    """Place of the largest of the scores [N]; ties go to the earlier response. Raises ValueError for none or NaN."""
    if len(scores) == 0 or np.isnan(scores).any():
        raise ValueError(f"best of {len(scores)} responses needs at least one score and no NaN")
    return int(np.argmax(scores))


def vote(answers: Sequence[Hashable | None], weights: Float64) -> int:
    """Place of the first response with the answer whose weights [N] sum to most; ties go to the earlier answer.

    A response without an answer has no vote; if none has one, the first response is taken.
    """
    totals: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + float(weight)
    if not totals:
        return 0
    return list(answers).index(max(totals, key=lambda answer: totals[answer]))


def majority(answers: Sequence[Hashable | None]) -> int:
    """Place of the first response with the most frequent answer; ties go to the earlier answer."""
    return vote(answers, np.ones(len(answers)))


def weighted_vote(answers: Sequence[Hashable | None], scores: Float64) -> int:
    """`vote` with weights sigma(score): unlike in `best_of_n`, the scale of the scores matters."""
    return vote(answers, vote_weights(scores))


def vote_weights(scores: Float64) -> Float64:
    """sigma(s) [N], without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(scores, dtype=np.float64))))


def subsets(responses: int, n: int, limit: int, seed: int) -> Iterator[tuple[int, ...]]:
    """All subsets of n of the responses in ascending order, or `limit` random ones where there are more.

    Mean results over them are the expectation over which responses happened to be sampled first.
    """
    if math.comb(responses, n) <= limit:
        yield from combinations(range(responses), n)
        return
    rng = np.random.default_rng(seed)
    for _ in range(limit):
        yield tuple(sorted(rng.choice(responses, n, replace=False).tolist()))
