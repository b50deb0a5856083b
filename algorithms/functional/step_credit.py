"""Process rewards of steps, made safe against hacking: clip, delta (arXiv 2410.15115) and min-form credit (PURE).

`steps` are one sample's step rewards [S], in order; all functions are per sample and in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from algorithms.functional.advantages import Bool, Float64, Int64, members_of_groups
from algorithms.functional.returns import Masks, Ragged

Spans = Sequence[tuple[int, int]]
"""Response tokens [start, end) of each step."""


def clip(steps: Float64, bound: float) -> Float64:
    """min(p - bound, 0) per step [S]: nothing is gained by more steps, only lost by bad ones."""
    return np.minimum(np.asarray(steps, dtype=np.float64) - bound, 0.0)


def delta(steps: Float64) -> Float64:
    """p_k - p_{k+1} for k < S - 1, then p_{S-1}, then 0 for the last step [S].

    The undiscounted reward-to-go of step k < S is then p_k itself, so repeating a step adds nothing. One step: 0.
    """
    steps = np.asarray(steps, dtype=np.float64)
    result = np.zeros(len(steps), dtype=np.float64)
    if len(steps) > 1:
        result[:-2] = steps[:-2] - steps[1:-1]
        result[-2] = steps[-2]
    return result


def soft_min_rewards(steps: Float64, temperature: float = 0.1) -> Float64:
    """PURE (arXiv 2504.15275): r_k = w_k p_k with w = softmax(-p / temperature) over the sample's steps [S].

    Their reward-to-go is the min-form return: for temperature -> 0 the first one is min(p). The paper's temperature
    is 0.1. No steps: no rewards.
    """
    steps = np.asarray(steps, dtype=np.float64)
    if len(steps) == 0:
        return steps
    logits = -steps / temperature
    weights = np.exp(logits - logits.max())
    rewards: Float64 = steps * weights / weights.sum()
    return rewards


def hard_min_returns(steps: Float64) -> Float64:
    """v_k = min over l >= k of p_l [S]: the value of a step is that of the worst one still to come."""
    return np.minimum.accumulate(np.asarray(steps, dtype=np.float64)[::-1])[::-1]


def on_step_ends(steps: Sequence[Float64], spans: Sequence[Spans], masks: Masks) -> list[Float64]:
    """Step rewards on the last marked token of each step; ragged [S_i] -> ragged [T_i].

    A step without a marked token earns nothing. Raises ValueError if a sample's rewards and spans differ in number.
    """
    placed = [np.zeros(len(mask), dtype=np.float64) for mask in masks]
    for row, rewards, places, mask in zip(placed, steps, spans, masks, strict=True):
        for reward, (start, end) in zip(rewards, places, strict=True):
            marked = np.flatnonzero(mask[start:end])
            if len(marked):
                row[start + marked[-1]] += reward
    return placed


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

    steps, spans ragged [S_i]; masks ragged [T_i]; valid, group [B] -> ragged [T_i], keep [B]. Each step earns
    w_k p_k - b * (its marked tokens), b being the mean over the other valid samples of the group of their mean reward
    per marked step token (the authors' `reward_baseline=token`). All tokens of a step share the return from that step
    on; tokens outside of steps (separators) get 0. Samples alone in their group get 0 and keep False. The verifiable
    reward comes on top, as `spread(leave_one_out(...))` times its coefficient (the authors': 1).
    """
    tokens = [np.array([mask[a:b].sum() for a, b in s], dtype=np.float64) for mask, s in zip(masks, spans, strict=True)]
    earned = [soft_min_rewards(step, temperature) for step in steps]
    per_token = np.array(
        [reward.sum() / n.sum() if n.sum() else 0.0 for reward, n in zip(earned, tokens, strict=True)], dtype=np.float64
    )
    advantages = [np.zeros(len(mask), dtype=np.float64) for mask in masks]
    keep = np.zeros(len(valid), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        for i in members:
            baseline = per_token[members[members != i]].mean()
            returns = np.cumsum((earned[i] - baseline * tokens[i])[::-1])[::-1]
            for value, (start, end) in zip(returns, spans[i], strict=True):
                advantages[i][start:end] = np.where(masks[i][start:end], value, 0.0)
    return advantages, keep
