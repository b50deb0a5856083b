"""Process rewards and preferences of several rewards as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rlkit.experience import PreferencePair, Score
from rlkit.experience.types import FloatArray, SpanReward


def summed_tokens(scores: Sequence[Score], weights: Sequence[float]) -> FloatArray | None:
    """sum w r_t [T] over the scores that have token rewards; None if none has."""
    found = [
        weight * score.token_rewards.astype(np.float64)
        for score, weight in zip(scores, weights, strict=True)
        if score.token_rewards is not None
    ]
    return np.sum(found, axis=0).astype(np.float32) if found else None


def summed_spans(scores: Sequence[Score], weights: Sequence[float]) -> tuple[SpanReward, ...]:
    """sum w r over equal spans; others stand side by side, in the order of their ends."""
    values: defaultdict[tuple[int, int], float] = defaultdict(float)
    for score, weight in zip(scores, weights, strict=True):
        for span in score.span_rewards:
            values[span.end, span.start] += weight * span.value
    return tuple(SpanReward(start, end, value) for (end, start), value in sorted(values.items()))


def averaged_pairs(
    opinions: Sequence[Sequence[PreferencePair]], weights: Sequence[float]
) -> tuple[PreferencePair, ...]:
    """For every two samples compared by anyone: the |weight|-weighted mean of the probability, winner named first.

    A reward with a negative weight counts for the other sample; one with weight 0 has no say.
    """
    votes: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for pairs, weight in zip(opinions, weights, strict=True):
        for pair in pairs if weight else ():
            forward = (pair.winner < pair.loser) == (weight > 0)
            probability = pair.probability if forward else 1.0 - pair.probability
            votes[min(pair.winner, pair.loser), max(pair.winner, pair.loser)].append((abs(weight), probability))
    made = []
    for (left, right), found in sorted(votes.items()):
        total = sum(weight for weight, _ in found)
        probability = sum(weight * p for weight, p in found) / total
        winner, loser = (left, right) if probability >= 0.5 else (right, left)
        made.append(PreferencePair(winner, loser, max(probability, 1.0 - probability)))
    return tuple(made)
