"""What most algorithms read from an Experience: one outcome reward per sample, whom it is compared with, its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from algorithms.base import Advantages, Experience
from algorithms.functional.advantages import Bool, Float64, Int64
from algorithms.functional.returns import Masks, Ragged


@dataclass(frozen=True)
class Outcomes:
    """All samples of an Experience, numbered group by group; B samples."""

    rewards: Float64
    """[B] outcome rewards, 0 where invalid."""
    valid: Bool
    """[B] samples with an outcome reward and at least one trained token."""
    group: Int64
    """[B] the place of each sample's group."""
    masks: Masks
    """Ragged [T]: trained tokens."""
    lengths: Int64
    """[B] response tokens, trained or not."""


def outcomes(experience: Experience) -> Outcomes:
    """Raises ValueError if a group was not scored yet."""
    rows = [(g, sample, score) for g, group in enumerate(experience.groups) for sample, score in group.scored()]
    masks = [sample.trained for _, sample, _ in rows]
    return Outcomes(
        rewards=np.array([0.0 if score.value is None else score.value for _, _, score in rows], dtype=np.float64),
        valid=np.array(
            [
                score.valid and score.value is not None and bool(mask.any())
                for (_, _, score), mask in zip(rows, masks, strict=True)
            ],
            dtype=np.bool_,
        ),
        group=np.array([g for g, _, _ in rows], dtype=np.int64),
        masks=masks,
        lengths=np.array([len(sample) for _, sample, _ in rows], dtype=np.int64),
    )


def token_advantages(tokens: Ragged, keep: Bool, masks: Masks, metrics: Mapping[str, float]) -> Advantages:
    """Ragged float64 advantages as the learner takes them, with the metrics that every algorithm reports.

    `advantage/mean_absolute` and `advantage/zero_share` are over trained tokens of kept samples.
    """
    chosen = [row[mask] for row, mask, kept in zip(tokens, masks, keep, strict=True) if kept]
    size = np.abs(np.concatenate(chosen)) if chosen else np.zeros(0)
    return Advantages(
        tokens=[row.astype(np.float32) for row in tokens],
        keep=keep,
        metrics={
            "advantage/mean_absolute": float(size.mean()) if len(size) else 0.0,
            "advantage/zero_share": float((size == 0).mean()) if len(size) else 1.0,
            **metrics,
        },
    )
