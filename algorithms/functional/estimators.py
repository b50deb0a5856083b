"""Per-sample advantages other than GRPO's and RLOO's: one function per paper."""

from __future__ import annotations

import math

import numpy as np

from algorithms.functional.advantages import Bool, Float64, Int64, group_relative, members_of_groups
from rlkit.experience import UserError


def length_weighted(rewards: Float64, valid: Bool, group: Int64, trained: Int64) -> tuple[Float64, Bool]:
    """OPO's advantage (arXiv 2505.23585): r - sum(l r) / sum(l) over the group's valid samples.

    rewards, valid, group, trained [B] (l, trained tokens) -> advantages, keep [B]. This baseline has the least variance
    if the squared gradient of a sample grows with its length.
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

    alpha = B / (B - M), where M of the step's B kept samples are in groups with equal rewards, so that those do not
    shrink the gradient. F = 1, or the group's standard deviation.
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
            "algorithm.estimator=maxrl divides by the mean reward of a group, and one sample has the reward "
            f"{rewards[valid].min()}: use a reward that is never below 0, preferably 0 or 1"
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

    Over all subsets of k of a group's n valid samples, whose reward is their largest: m is the mean over those that
    contain the sample; mean and std are over all. With rewards of 0 and 1, W of them 0: mean = 1 - C(W, k) / C(n, k),
    std = sqrt(mean (1 - mean)), m = 1 for a right sample and 1 - C(W - 1, k - 1) / C(n - 1, k - 1) for a wrong one. A
    group with fewer than k valid samples gets keep=False; one whose subsets all have the same reward gets 0.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    keep = np.zeros(len(rewards), dtype=np.bool_)
    for members in members_of_groups(valid, group, at_least=max(k, 2)):
        keep[members] = True
        n, order = len(members), np.argsort(rewards[members], kind="stable")
        ranked = rewards[members][order]
        if (ranked == ranked[-1]).sum() > n - k:
            continue  # every subset contains a best sample
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
    """GDPO's advantage (arXiv 2601.05242): GRPO's advantages of each reward, in a weighted sum, over the std of the
    step.

    components [B, K], weights [K], valid, group [B] -> advantages, keep [B]. The step's mean, which the paper
    subtracts, is already 0.
    """
    relative = [group_relative(column, valid, group, normalize_by_std=True) for column in components.T]
    total, keep = np.stack([advantages for advantages, _ in relative], axis=1) @ weights, relative[0][1]
    std = total[keep].std(ddof=1) if keep.any() else 0.0
    return total / (std + 1e-6), keep


def against_greedy(rewards: Float64, valid: Bool, greedy: Float64, greedy_valid: Bool) -> tuple[Float64, Bool]:
    """ReMax's advantage (arXiv 2310.10505): r minus the reward of the prompt's greedy response.

    rewards, valid [B]; greedy, greedy_valid [B], repeated for each sample -> advantages, keep [B]. Without a valid
    greedy response, keep is False.
    """
    keep = valid & greedy_valid
    return np.where(keep, np.where(keep, rewards, 0.0) - np.where(keep, greedy, 0.0), 0.0), keep


def against_reference(
    wins: Bool, reference: Bool, valid: Bool, group: Int64, *, max_skew: float = 0.6
) -> tuple[Float64, Bool]:
    """BRPO's advantage (Writing-Zero): +1 if the sample wins against its group's reference sample, else -1.

    wins [B] (ignored for references), reference [B], valid, group [B] -> advantages, keep [B]. The reference gets 0. A
    group is dropped if |sum of advantages| / its valid samples exceeds `max_skew`, if it has fewer than two valid
    samples, or if its reference is invalid. Raise ValueError for several references in a group.
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
