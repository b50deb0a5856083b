"""Scored samples, baselines and advantages; pure numpy.

`rewards` [B] are ignored where `valid` [B] is False; samples outside `keep` [B] have advantage 0 and stay out of the
loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from algorithms.base import Advantages, Experience

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]
Ragged = Sequence[Float64]
"""[T_i] per sample, i = 1 .. B."""
Masks = Sequence[Bool]
"""Ragged [T_i]: marks trained tokens."""


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
    """[B] trained response tokens."""
    truncated: Bool
    """[B] cut off at the length limit."""

    @classmethod
    def of(cls, experience: Experience, needed: bool = True) -> Outcomes:
        """Collect the samples. If outcomes are `needed`, a score without one is invalid. Raise ValueError if a group
        has not been scored."""
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
            lengths=np.array([sample.length for _, sample, _ in rows], dtype=np.int64),
            truncated=np.array([sample.finish_reason == "length" for _, sample, _ in rows], dtype=np.bool_),
        )


def spread(values: Float64, masks: Masks) -> list[Float64]:
    """values [B] -> ragged: the value on marked tokens, 0 elsewhere."""
    return [np.where(mask, value, 0.0) for value, mask in zip(values, masks, strict=True)]


def token_advantages(tokens: Ragged, keep: Bool, masks: Masks, metrics: Mapping[str, float]) -> Advantages:
    """Wrap ragged float64; `advantage/mean_absolute` and `advantage/zero_share` are over trained tokens of kept
    samples."""
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
    """Yield the indices of each group's valid samples, if there are at least `at_least`."""
    for g in np.unique(group[valid]):
        members = np.flatnonzero((group == g) & valid)
        if len(members) >= at_least:
            yield members


def group_relative(
    rewards: Float64, valid: Bool, group: Int64, *, normalize_by_std: bool, epsilon: float = 1e-6
) -> tuple[Float64, Bool]:
    """GRPO's advantage (arXiv 2402.03300 section 4.1.2): (r - mean of group) / (std of group + eps).

    rewards, valid, group [B] -> advantages, keep [B]. Statistics are over valid samples, with ddof 1. Without
    `normalize_by_std`: Dr. GRPO's (arXiv 2503.20783). Invalid samples, and groups with fewer than two valid ones, get 0
    and keep=False; a group with equal rewards gets 0 and is kept.
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

    rewards, valid, group [B] -> advantages, keep [B]. A lone valid sample gets 0 and keep=False; samples with equal
    rewards get 0 and are kept.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    keep = np.zeros(len(rewards), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        mine, n = rewards[members], len(members)
        if np.ptp(mine) > 0.0:
            advantages[members] = (mine - mine.mean()) * n / (n - 1)
    return advantages, keep


def overlong_penalty(lengths: Int64, max_tokens: int, buffer_tokens: float) -> Float64:
    """DAPO's penalty on long responses (arXiv 2503.14476 eq. 13), to be added to the rewards.

    lengths [B] in response tokens -> [B]: 0 up to max_tokens - buffer_tokens, then linear to -1 at max_tokens and
    beyond.
    """
    over = lengths.astype(np.float64) - (max_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)
