"""Credit for the steps of a response: clip and delta (arXiv 2410.15115), min-form credit (PURE, arXiv 2504.15275).

One sample's step rewards are [S] in float64; several samples are ragged [S_i].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from algorithms.base import Experience
from algorithms.functional.advantages import Bool, Float64, Int64, Masks, Ragged, members_of_groups
from rlkit.experience import Group, Sample, Score

Spans = Sequence[tuple[int, int]]
"""Response tokens [start, end) per step."""


@dataclass(frozen=True)
class Steps:
    rewards: list[Float64]
    """Ragged [S_i]"""
    spans: Sequence[Spans]

    @classmethod
    def of(cls, experience: Experience) -> Steps:
        """Use a score's span rewards in order of their ends; else its token rewards, summed over the trained tokens of
        the sample's spans, or each alone without spans. Invalid samples have no steps.

        Raise ValueError if a valid score has neither.
        """
        rows = [
            _steps_of(group, sample, score) if score.valid else ([], [])
            for group in experience.groups
            for sample, score in group.scored()
        ]
        return cls([np.array(values, dtype=np.float64) for values, _ in rows], [spans for _, spans in rows])

    def masks(self, trained: Masks) -> list[Bool]:
        """Ragged [T_i]: trained tokens inside a step."""
        masks = [np.zeros_like(mask) for mask in trained]
        for row, mask, spans in zip(masks, trained, self.spans, strict=True):
            for start, end in spans:
                row[start:end] = mask[start:end]
        return masks


def _steps_of(group: Group, sample: Sample, score: Score) -> tuple[list[float], list[tuple[int, int]]]:
    if score.span_rewards:
        ordered = sorted(score.span_rewards, key=lambda span: (span.end, span.start))
        return [span.value for span in ordered], [(span.start, span.end) for span in ordered]
    if score.token_rewards is None:
        raise ValueError(
            f"group {group.id}, sample {sample.index}: this algorithm needs process rewards, and the reward gave none; "
            "use reward=implicit_prm"
        )
    trained = sample.trained
    spans = [(span.start, span.end) for span in sample.spans if trained[span.start : span.end].any()]
    spans = spans or [(int(t), int(t) + 1) for t in np.flatnonzero(trained)]
    tokens = np.where(trained, score.token_rewards, 0.0).astype(np.float64)
    return [float(tokens[start:end].sum()) for start, end in spans], spans


def clip(steps: Float64, bound: float) -> Float64:
    """min(p_k - bound, 0) per step [S]."""
    return np.minimum(np.asarray(steps, dtype=np.float64) - bound, 0.0)


def delta(steps: Float64) -> Float64:
    """p_k - p_{k+1} for k < S - 1, then p_{S-1}, then 0 for the last step [S].

    The undiscounted reward-to-go of step k < S is p_k itself.
    """
    steps = np.asarray(steps, dtype=np.float64)
    rewards = np.zeros_like(steps)
    rewards[:-1] = steps[:-1]
    rewards[:-2] -= steps[1:-1]
    return rewards


def soft_min_rewards(steps: Float64, temperature: float = 0.1) -> Float64:
    """PURE (arXiv 2504.15275): r_k = w_k p_k with w = softmax(-p / temperature) over the sample's steps [S], S >= 0."""
    steps = np.asarray(steps, dtype=np.float64)
    if len(steps) == 0:
        return steps
    logits = -steps / temperature
    weights = np.exp(logits - logits.max())
    rewards: Float64 = steps * weights / weights.sum()
    return rewards


def on_step_ends(steps: Sequence[Float64], spans: Sequence[Spans], masks: Masks) -> list[Float64]:
    """Step rewards on the last marked token of each step; ragged [S_i] -> ragged [T_i].

    A step without a marked token earns nothing. Raise ValueError if a sample's rewards and spans differ in number.
    """
    tokens = [np.zeros(len(mask), dtype=np.float64) for mask in masks]
    for row, rewards, ranges, mask in zip(tokens, steps, spans, masks, strict=True):
        for reward, (start, end) in zip(rewards, ranges, strict=True):
            marked = np.flatnonzero(mask[start:end])
            if len(marked):
                row[start + marked[-1]] += reward
    return tokens


def min_form(
    steps: Ragged,
    spans: Sequence[Spans],
    masks: Masks,
    valid: Bool,
    group: Int64,
    *,
    temperature: float = 0.1,
) -> tuple[list[Float64], Bool]:
    """PURE's process advantage of each token: min-form return-to-go minus the leave-one-out baseline per token.

    steps, spans ragged [S_i]; masks ragged [T_i]; valid, group [B] -> ragged [T_i], keep [B]. A step earns w_k p_k - b
    * (its marked tokens), where b is the reward per marked step token of the group's other valid samples (the authors'
    `reward_baseline=token`). Tokens of a step share its return; tokens outside of steps get 0. A single valid sample
    gets 0 and keep False.
    """
    tokens = [np.array([mask[a:b].sum() for a, b in s], dtype=np.float64) for mask, s in zip(masks, spans, strict=True)]
    earned = [soft_min_rewards(step, temperature) for step in steps]
    totals = np.array([(rewards.sum(), n.sum()) for rewards, n in zip(earned, tokens, strict=True)])
    advantages = [np.zeros(len(mask), dtype=np.float64) for mask in masks]
    keep = np.zeros(len(valid), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        for i in members:
            others, length = totals[members[members != i]].sum(axis=0)
            baseline = others / length if length else 0.0
            returns = np.cumsum((earned[i] - baseline * tokens[i])[::-1])[::-1]
            for value, (start, end) in zip(returns, spans[i], strict=True):
                advantages[i][start:end] = np.where(masks[i][start:end], value, 0.0)
    return advantages, keep
