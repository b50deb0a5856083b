"""A group's greedy response is scored like one more sample and then kept apart again. Pure."""

from __future__ import annotations

from dataclasses import replace

from rlkit.experience import Group, GroupScores


def with_greedy(group: Group) -> Group:
    """The group with its greedy response as last sample, and its score as last score; itself if it has none."""
    if group.greedy is None:
        return group
    samples = (*group.samples, replace(group.greedy, index=len(group.samples)))
    scores = group.scores
    if scores is not None and scores.greedy is not None:
        scores = GroupScores((*scores.samples, scores.greedy), scores.pairs)
    return replace(group, samples=samples, scores=scores, greedy=None)


def without_greedy(scored: Group, original: Group) -> Group:
    """The reverse, for a scored group; preferences that the greedy response takes part in are left out."""
    if original.greedy is None or scored.scores is None:
        return scored
    count = len(original.samples)
    pairs = tuple(pair for pair in scored.scores.pairs if pair.winner < count and pair.loser < count)
    scores = GroupScores(scored.scores.samples[:count], pairs, greedy=scored.scores.samples[count])
    return replace(original, scores=scores)
