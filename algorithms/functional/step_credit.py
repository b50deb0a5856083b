"""Credit for the steps of responses, from their process rewards.

A response's step rewards p are [S_i] in float64; several responses are ragged. `valid`, `group` [B]. Baselines are over
a group's valid samples. Credit is 0 for invalid samples and in groups with fewer than two valid ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from algorithms.base import Experience
from algorithms.functional.advantages import Bool, Float64, Int64, Masks, Ragged, members_of_groups
from rlkit.experience import Group, Sample, Score
from rlkit.experience.steps import process_rewards

EPSILON = 1e-8
"""Added to standard deviations."""


@dataclass(frozen=True)
class Steps:
    """Process rewards as every algorithm sees them (`rlkit.experience.steps.process_rewards`)."""

    rewards: list[Float64]
    """Ragged [S_i]"""
    spans: Sequence[Int64]
    """Per sample [S_i, 2]: response tokens [start, end) of each step, sorted by end."""
    trained: Masks

    @staticmethod
    def states(experience: Experience, spans: Sequence[Int64]) -> list[list[str | None]]:
        """Ragged [S_i]: the state in which the turn with a step's span was taken; None if unknown."""
        samples = [sample for group in experience.groups for sample in group.samples]
        known = [{(span.start, span.end): span.data.get("state") for span in sample.spans} for sample in samples]
        return [[of.get((start, end)) for start, end in row.tolist()] for of, row in zip(known, spans, strict=True)]

    @classmethod
    def of(cls, experience: Experience, needed: bool = True) -> Steps:
        """Collect the steps. Raise ValueError if process rewards are `needed` and a valid score of a trained sample has
        none."""
        rows = [
            _steps_of(group, sample, score, needed) for group in experience.groups for sample, score in group.scored()
        ]
        trained = [sample.trained for group in experience.groups for sample in group.samples]
        return cls([rewards for rewards, _ in rows], [spans for _, spans in rows], trained)

    def lengths(self) -> list[Int64]:
        """Ragged [S_i]: trained tokens of each step."""
        counts = [np.concatenate([[0], np.cumsum(mask)]) for mask in self.trained]
        return [count[spans[:, 1]] - count[spans[:, 0]] for count, spans in zip(counts, self.spans, strict=True)]

    def inside(self) -> list[Bool]:
        """Ragged [T_i]: marks the trained tokens of steps."""
        return [row > 0 for row in self.over_tokens([np.ones(len(rewards)) for rewards in self.rewards])]

    def over_tokens(self, values: Ragged) -> list[Float64]:
        """values [S_i] -> ragged [T_i]: a step's value on its trained tokens; where steps overlap, the first one's."""
        rows = []
        for steps, spans, mask in zip(values, self.spans, self.trained, strict=True):
            lengths = (spans[:, 1] - spans[:, 0])[::-1]
            skipped = np.cumsum(lengths) - lengths
            row = np.zeros(len(mask), dtype=np.float64)
            tokens = np.repeat(spans[::-1, 0] - skipped, lengths) + np.arange(lengths.sum())
            row[tokens] = np.repeat(steps[::-1], lengths)
            rows.append(np.where(mask, row, 0.0))
        return rows

    def on_last_tokens(self) -> list[Float64]:
        """Rewards as ragged [T_i], each on the last trained token up to its step's end; dropped if there is none."""
        rows = []
        for steps, spans, mask in zip(self.rewards, self.spans, self.trained, strict=True):
            row = np.zeros(len(mask), dtype=np.float64)
            last = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))
            tokens = last[spans[:, 1] - 1]
            np.add.at(row, tokens[tokens >= 0], steps[tokens >= 0])
            rows.append(row)
        return rows


def _steps_of(group: Group, sample: Sample, score: Score, needed: bool) -> tuple[Float64, Int64]:
    rewards, spans = process_rewards(sample, score)
    if needed and not len(rewards) and score.valid and sample.trained.any():
        raise ValueError(
            f"group {group.id}, sample {sample.index}: this algorithm needs process rewards, and the reward gave none; "
            "use reward=implicit_prm"
        )
    return rewards, spans


def clip(steps: Float64, bound: float) -> Float64:
    """min(p_k - bound, 0) per step [S] (arXiv 2410.15115)."""
    return np.minimum(np.asarray(steps, dtype=np.float64) - bound, 0.0)


def delta(steps: Float64) -> Float64:
    """p_k - p_{k+1} for k < S - 1, then p_{S-1}, then 0 for the last step [S] (arXiv 2410.15115).

    The undiscounted reward-to-go of step k < S is p_k itself.
    """
    steps = np.asarray(steps, dtype=np.float64)
    rewards = np.zeros_like(steps)
    rewards[:-1] = steps[:-1]
    rewards[:-2] -= steps[1:-1]
    return rewards


def to_go(steps: Float64, gamma: float = 1.0) -> Float64:
    """sum over l >= k of gamma^(l-k) p_l, [S] -> [S]."""
    returns = np.asarray(steps, dtype=np.float64).copy()
    if gamma == 1.0:
        return np.cumsum(returns[::-1])[::-1]
    for k in range(len(returns) - 2, -1, -1):
        returns[k] += gamma * returns[k + 1]
    return returns


def soft_min_rewards(steps: Float64, temperature: float = 0.1) -> Float64:
    """PURE (arXiv 2504.15275): r_k = w_k p_k with w = softmax(-p / temperature) over the sample's steps [S], S >= 0."""
    steps = np.asarray(steps, dtype=np.float64)
    if len(steps) == 0:
        return steps
    logits = -steps / temperature
    weights = np.exp(logits - logits.max())
    rewards: Float64 = steps * weights / weights.sum()
    return rewards


def min_form(
    steps: Ragged, lengths: Sequence[Int64], valid: Bool, group: Int64, *, temperature: float = 0.1
) -> list[Float64]:
    """PURE: min-form reward-to-go minus the leave-one-out baseline per token; ragged [S_i] -> ragged [S_i].

    `lengths` ragged [S_i]: trained tokens. A step earns w_k p_k - b * (its tokens), where b is the reward per step
    token of the group's other valid samples (the authors' `reward_baseline=token`).
    """
    earned = [soft_min_rewards(row, temperature) for row in steps]
    totals = np.array([(rewards.sum(), n.sum()) for rewards, n in zip(earned, lengths, strict=True)])
    credit = [np.zeros(len(row), dtype=np.float64) for row in steps]
    for members in members_of_groups(valid, group):
        for i in members:
            others, tokens = totals[members[members != i]].sum(axis=0)
            baseline = others / tokens if tokens else 0.0
            credit[i] = to_go(earned[i] - baseline * lengths[i])
    return credit


def pooled_z(steps: Ragged, valid: Bool, group: Int64, *, ddof: int) -> list[Float64]:
    """(p - mean) / (std + eps) over the pooled steps of a group; 0 if they are all equal. Ragged [S_i]."""
    scores = [np.zeros(len(row), dtype=np.float64) for row in steps]
    for members in members_of_groups(valid, group):
        pool = np.concatenate([steps[i] for i in members])
        if len(pool) > ddof and np.ptp(pool) > 0.0:
            for i in members:
                scores[i] = (steps[i] - pool.mean()) / (pool.std(ddof=ddof) + EPSILON)
    return scores


def leave_one_out_to_go(steps: Ragged, valid: Bool, group: Int64, gamma: float = 1.0) -> list[Float64]:
    """Reward-to-go of step k minus the mean reward-to-go of the others' step k, which is 0 after their last step.

    The baseline depends only on k and the other samples, so it does not reward having more or fewer steps. Ragged
    [S_i].
    """
    credit = [np.zeros(len(row), dtype=np.float64) for row in steps]
    for members in members_of_groups(valid, group):
        returns = np.zeros((len(members), max(len(steps[i]) for i in members)))
        for row, i in zip(returns, members, strict=True):
            row[: len(steps[i])] = to_go(steps[i], gamma)
        relative = (returns - returns.mean(axis=0)) * len(members) / (len(members) - 1)
        relative[:, np.ptp(returns, axis=0) == 0.0] = 0.0
        for row, i in zip(relative, members, strict=True):
            credit[i] = row[: len(steps[i])]
    return credit


def minus_state_mean(
    returns: Ragged, states: Sequence[Sequence[str | None]], valid: Bool, group: Int64, *, normalize_by_std: bool
) -> tuple[list[Float64], float]:
    """GiGPO (arXiv 2505.10978 eq. 6, 7): returns minus the mean of the group's steps in the same state.

    returns, states ragged [S_i]. The standard deviation has ddof 1. The second result is the share of steps whose state
    occurred more than once in the group; other steps, and those whose state is None, get 0.
    """
    relative = [np.zeros(len(row), dtype=np.float64) for row in returns]
    shared = total = 0
    for members in members_of_groups(valid, group):
        places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for i in members:
            total += len(states[i])
            for k, state in enumerate(states[i]):
                if state is not None:
                    places[state].append((i, k))
        for steps in places.values():
            mine = np.array([returns[i][k] for i, k in steps])
            shared += len(steps) if len(steps) > 1 else 0
            if np.ptp(mine) > 0.0:
                scale = mine.std(ddof=1) + EPSILON if normalize_by_std else 1.0
                for (i, k), value in zip(steps, (mine - mine.mean()) / scale, strict=True):
                    relative[i][k] = value
    return relative, shared / max(total, 1)


def minus_position_mean(tokens: Ragged, masks: Masks, valid: Bool, group: Int64) -> list[Float64]:
    """Each token minus the mean of the group's tokens at the same position in the response, as in IGPO's code.

    tokens, masks ragged [T_i] -> ragged [T_i], 0 on unmarked tokens, which are left out of the means.
    """
    relative = [np.zeros(len(row), dtype=np.float64) for row in tokens]
    for members in members_of_groups(valid, group):
        longest = max(len(tokens[i]) for i in members)
        some, excess, counts = np.zeros(longest), np.zeros(longest), np.zeros(longest)
        for i in members:
            some[: len(tokens[i])] = np.where(masks[i], tokens[i], some[: len(tokens[i])])
            counts[: len(tokens[i])] += masks[i]
        for i in members:
            excess[: len(tokens[i])] += np.where(masks[i], tokens[i] - some[: len(tokens[i])], 0.0)
        means = some + excess / np.maximum(counts, 1.0)  # exact if all are equal
        for i in members:
            relative[i] = np.where(masks[i], tokens[i] - means[: len(tokens[i])], 0.0)
    return relative
