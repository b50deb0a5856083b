"""Scored samples, baselines and advantages; pure numpy.

`rewards` [B] are ignored where `valid` [B] is False; samples outside `keep` [B] have advantage 0 and stay out of the
loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from algorithms.base import Advantages, Experience
from rlkit.experience import UserError

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]
Ragged = Sequence[Float64]
"""[T_i] per sample, i = 1 .. B."""
Masks = Sequence[Bool]
"""Ragged [T_i]: trained tokens."""


@dataclass(frozen=True)
class Outcomes:
    """The B samples of an Experience, group by group."""

    rewards: Float64
    """[B] outcome rewards, 0 where invalid."""
    valid: Bool
    """[B] samples with a valid score and at least one trained token."""
    group: Int64
    """[B] group index."""
    masks: Masks
    lengths: Int64
    """[B] response tokens, trained or not."""

    @classmethod
    def of(cls, experience: Experience, needed: bool = True) -> Outcomes:
        """Without an outcome a score is invalid if outcomes are `needed`. Raise ValueError if a group is not scored
        yet."""
        rows = [(g, sample, score) for g, group in enumerate(experience.groups) for sample, score in group.scored()]
        masks = [sample.trained for _, sample, _ in rows]
        valid = [
            score.valid and (score.value is not None or not needed) and bool(mask.any())
            for (_, _, score), mask in zip(rows, masks, strict=True)
        ]
        return cls(
            rewards=np.array([score.value or 0.0 for _, _, score in rows], dtype=np.float64),
            valid=np.array(valid, dtype=np.bool_),
            group=np.array([g for g, _, _ in rows], dtype=np.int64),
            masks=masks,
            lengths=np.array([len(sample) for _, sample, _ in rows], dtype=np.int64),
        )


def spread(values: Float64, masks: Masks) -> list[Float64]:
    """values [B] -> ragged: the value on marked tokens, 0 elsewhere."""
    return [np.where(mask, value, 0.0) for value, mask in zip(values, masks, strict=True)]


def token_advantages(tokens: Ragged, keep: Bool, masks: Masks, metrics: Mapping[str, float]) -> Advantages:
    """Ragged float64. `advantage/mean_absolute` and `advantage/zero_share` are over trained tokens of kept samples."""
    kept_rows = [row[mask] for row, mask, kept in zip(tokens, masks, keep, strict=True) if kept]
    size = np.abs(np.concatenate(kept_rows)) if kept_rows else np.zeros(0)
    return Advantages(
        tokens=[row.astype(np.float32) for row in tokens],
        keep=keep,
        metrics={
            "advantage/mean_absolute": float(size.mean()) if len(size) else 0.0,
            "advantage/zero_share": float((size == 0).mean()) if len(size) else 1.0,
            **metrics,
        },
    )


def members_of_groups(valid: Bool, group: Int64, at_least: int = 2) -> Iterator[Int64]:
    """Indices of each group's valid samples, if at least `at_least`."""
    for g in np.unique(group[valid]):
        members = np.flatnonzero((group == g) & valid)
        if len(members) >= at_least:
            yield members


def group_relative(
    rewards: Float64, valid: Bool, group: Int64, *, normalize_by_std: bool, epsilon: float = 1e-6
) -> tuple[Float64, Bool]:
    """GRPO's advantage (arXiv 2402.03300 section 4.1.2): (r - mean of group) / (std of group + eps).

    rewards, valid, group [B] -> advantages, keep [B]. Statistics are over valid samples, with ddof 1. Without
    `normalize_by_std`: Dr. GRPO's (arXiv 2503.20783). Invalid samples and groups with fewer than two valid ones get 0
    and keep False; an all-equal group gets 0 and is kept.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    keep = np.zeros(len(rewards), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        centred = rewards[members] - rewards[members].mean()
        if np.ptp(rewards[members]) == 0.0:
            continue  # exactly zero, not rounding noise divided by epsilon
        advantages[members] = centred / (rewards[members].std(ddof=1) + epsilon) if normalize_by_std else centred
    return advantages, keep


def leave_one_out(rewards: Float64, valid: Bool, group: Int64) -> tuple[Float64, Bool]:
    """RLOO's advantage (arXiv 2402.14740): r minus the mean of the group's *other* valid samples.

    rewards, valid, group [B] -> advantages, keep [B]. A single valid sample gets 0 and keep False; all-equal ones get 0
    and are kept.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    keep = np.zeros(len(rewards), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        mine, n = rewards[members], len(members)
        if np.ptp(mine) > 0.0:
            advantages[members] = (mine - mine.mean()) * n / (n - 1)
    return advantages, keep


def length_weighted(rewards: Float64, valid: Bool, group: Int64, trained: Int64) -> tuple[Float64, Bool]:
    """OPO's advantage (arXiv 2505.23585): r - sum(l r) / sum(l) over the group's valid samples.

    rewards, valid, group, trained [B] (l, trained tokens) -> advantages, keep [B]. That is the baseline of least
    variance if the squared gradient of a sample grows with its length.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    keep = np.zeros(len(rewards), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        mine, lengths = rewards[members], trained[members]
        if np.ptp(mine) > 0.0:
            advantages[members] = mine - (lengths * mine).sum() / lengths.sum()
    return advantages, keep


def group_policy_gradient(
    rewards: Float64, valid: Bool, group: Int64, *, normalize_by_std: bool
) -> tuple[Float64, Bool]:
    """GPG's advantage (arXiv 2504.02546): alpha (r - mean of group) / F.

    alpha = B / (B - M), M of the step's B kept samples being in groups with equal rewards, so that these do not shrink
    the gradient. F = 1, or the group's standard deviation.
    """
    advantages, keep = group_relative(rewards, valid, group, normalize_by_std=normalize_by_std)
    unequal = sum(len(members) for members in members_of_groups(keep, group) if np.ptp(rewards[members]) > 0.0)
    return advantages * (keep.sum() / unequal if unequal else 1.0), keep


def mean_normalised(rewards: Float64, valid: Bool, group: Int64) -> tuple[Float64, Bool]:
    """MaxRL's advantage (arXiv 2602.02710): (r - mean of group) / mean of group.

    Its expected gradient is that of the first N - 1 terms of log p = -sum_k (1 - p)^k / k, for N samples and rewards of
    0 and 1. Groups with a mean of 0 get 0. Raise UserError for a reward below 0.
    """
    if (rewards[valid] < 0).any():
        raise UserError(
            "algorithm.estimator=maxrl divides by the mean reward of a group, and a sample has "
            f"{rewards[valid].min()}: take a reward that is never below 0, best 0 or 1"
        )
    advantages, keep = group_relative(rewards, valid, group, normalize_by_std=False)
    for members in members_of_groups(valid, group):
        if advantages[members].any():
            advantages[members] /= rewards[members].mean()
    return advantages, keep


def pass_at_k(
    rewards: Float64, valid: Bool, group: Int64, *, k: int, normalize_by_std: bool, epsilon: float = 1e-6
) -> tuple[Float64, Bool]:
    """Pass@k training's analytical advantage (arXiv 2508.10751): (m - mean) / (std + eps).

    Over all subsets of k of a group's n valid samples, whose reward is their largest: m is the mean of those with the
    sample in them; mean and std are over all. With rewards of 0 and 1, W of them 0: mean = 1 - C(W, k) / C(n, k), std =
    sqrt(mean (1 - mean)), m = 1 for a right sample and 1 - C(W - 1, k - 1) / C(n - 1, k - 1) for a wrong one. A group
    with fewer than k valid samples gets keep False, one whose subsets all have the same reward 0.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    keep = np.zeros(len(rewards), dtype=np.bool_)
    for members in members_of_groups(valid, group, at_least=max(k, 2)):
        keep[members] = True
        n, order = len(members), np.argsort(rewards[members], kind="stable")
        ranked = rewards[members][order]
        if (ranked == ranked[-1]).sum() > n - k:
            continue  # a best sample is in every subset
        largest = np.array([math.comb(i, k - 1) for i in range(n)]) / math.comb(n, k)
        mean = (largest * ranked).sum()
        with_it = np.array([math.comb(i, k - 1) for i in range(n)], dtype=np.float64) * ranked
        if k > 1:
            beside = np.array([math.comb(i - 1, k - 2) if i else 0 for i in range(n)], dtype=np.float64) * ranked
            with_it += np.append(np.cumsum(beside[::-1])[::-1][1:], 0.0)
        relative = with_it / math.comb(n - 1, k - 1) - mean
        std = math.sqrt((largest * (ranked - mean) ** 2).sum()) + epsilon if normalize_by_std else 1.0
        advantages[members[order]] = relative / std
    return advantages, keep


def decoupled(components: Float64, weights: Float64, valid: Bool, group: Int64) -> tuple[Float64, Bool]:
    """GDPO's advantage (arXiv 2601.05242): GRPO's of each reward, summed with weights, over the std of the step.

    components [B, K], weights [K], valid, group [B] -> advantages, keep [B]. The step's mean, which the paper takes
    off, is 0 already.
    """
    relative = [group_relative(column, valid, group, normalize_by_std=True) for column in components.T]
    total, keep = np.stack([advantages for advantages, _ in relative], axis=1) @ weights, relative[0][1]
    std = total[keep].std(ddof=1) if keep.any() else 0.0
    return total / (std + 1e-6), keep


def against_greedy(rewards: Float64, valid: Bool, greedy: Float64, greedy_valid: Bool) -> tuple[Float64, Bool]:
    """ReMax's advantage (arXiv 2310.10505): r minus the reward of the prompt's greedy response.

    rewards, valid [B]; greedy, greedy_valid [B], repeated for each sample -> advantages, keep [B]. Without a valid
    greedy response keep is False.
    """
    keep = valid & greedy_valid
    return np.where(keep, np.where(keep, rewards, 0.0) - np.where(keep, greedy, 0.0), 0.0), keep


def against_reference(
    wins: Bool, reference: Bool, valid: Bool, group: Int64, *, max_skew: float = 0.6
) -> tuple[Float64, Bool]:
    """BRPO's advantage (Writing-Zero): +1 if the sample wins against its group's reference sample, else -1.

    wins [B] (ignored for references), reference [B], valid, group [B] -> advantages, keep [B]. The reference gets 0. A
    group is dropped when |sum of advantages| / its valid samples exceeds `max_skew`, with fewer than two valid samples,
    or with an invalid reference. Raise ValueError for several references in a group.
    """
    advantages = np.zeros(len(wins), dtype=np.float64)
    keep = np.zeros(len(wins), dtype=np.bool_)
    for g in np.unique(group):
        if (count := int((reference & (group == g)).sum())) > 1:
            raise ValueError(f"group {g} has {count} reference samples; BRPO compares with exactly one")
    for members in members_of_groups(valid, group):
        if not reference[members].any():
            continue
        mine = np.where(reference[members], 0.0, np.where(wins[members], 1.0, -1.0))
        if abs(mine.sum()) / len(members) <= max_skew:
            advantages[members], keep[members] = mine, True
    return advantages, keep


def overlong_penalty(lengths: Int64, max_tokens: int, buffer_tokens: float) -> Float64:
    """DAPO's penalty on long responses (arXiv 2503.14476 eq. 13), to be added to the rewards.

    lengths [B] in response tokens -> [B]: 0 up to max_tokens - buffer_tokens, then linear to -1 at max_tokens and
    beyond.
    """
    over = lengths.astype(np.float64) - (max_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)
