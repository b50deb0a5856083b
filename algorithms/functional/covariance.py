"""Clip-Cov and KL-Cov (arXiv 2505.22617): hold back the few tokens that drive the policy's entropy down.

The covariance of a token is (A - mean A)(log mu - mean log mu) over all trained tokens of the step, mu being the
sampler's probability (paper: the policy's, within each mini-batch). The driver therefore selects once per step, and how
the step is split into mini-batches does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from algorithms.base import Advantages, Experience, FloatArray
from algorithms.functional.losses import clamped, clipped_surrogate
from rlkit.experience.section import Coefficient, Section

if TYPE_CHECKING:
    from torch import Tensor

Float64 = NDArray[np.float64]
SELECTED = "selected"


class ClipCov:
    """PPO's clipped surrogate, but without gradient on a random `share` of the step's tokens, drawn from those whose
    covariance is between `low` and `high`."""

    class Config(Section):
        share: float = Field(default=2e-4, gt=0, le=1)
        """Share of the step's trained tokens to select; at least one token."""
        low: float = 1.0
        """Smallest covariance of a token that may be selected; the mean is far below it."""
        high: float = 5.0
        """Largest covariance of a token that may be selected."""

    def __init__(self, config: Config) -> None:
        if config.low >= config.high:
            raise ValueError(f"low={config.low} is not below high={config.high}: no token would be selected")
        self.config = config

    def select(self, experience: Experience, credit: Advantages) -> dict[str, list[FloatArray]]:
        def order(covariance: Float64, draw: Float64) -> Float64:
            candidate = (covariance > self.config.low) & (covariance < self.config.high)
            return np.where(candidate, draw, np.inf)

        return select(experience, credit, self.config.share, order)

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        extras: Mapping[str, Tensor],
        clip_low: float,
        clip_high: float,
    ) -> tuple[Tensor, Tensor]:
        rows, binds = clipped_surrogate(logprobs, old_logprobs, advantages, clip_low, clip_high)
        selected = extras[SELECTED] > 0
        return rows.masked_fill(selected, 0.0), binds | selected


class KLCov:
    """-A ratio, plus coefficient x |log ratio| on the `share` of the step's tokens with the largest covariance (as in
    the authors' code). Nothing is clipped."""

    linear = False

    class Config(Section):
        share: float = Field(default=2e-3, gt=0, le=1)
        """Share of the step's trained tokens to select; at least one token (paper: 2e-3 for 7B, 2e-4 for 32B)."""
        coefficient: Coefficient = 1.0
        """Weight of the penalty."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def select(self, experience: Experience, credit: Advantages) -> dict[str, list[FloatArray]]:
        return select(experience, credit, self.config.share, lambda covariance, _: -covariance)

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, extras: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        log_ratio, selected = clamped(logprobs - old_logprobs), extras[SELECTED] > 0
        penalty = (self.config.coefficient * log_ratio.abs()).masked_fill(~selected, 0.0)
        return -advantages * log_ratio.exp() + penalty, selected


def select(
    experience: Experience, credit: Advantages, share: float, order: Callable[[Float64, Float64], Float64]
) -> dict[str, list[FloatArray]]:
    """Mark with 1 the `share` of the step's N trained tokens that come first by a finite `order`, the others with 0.

    `order` (covariances [N], draws [N]) -> [N]; a draw is uniform and depends only on its sample.
    """
    samples = [sample for group in experience.groups for sample in group.samples]
    masks = [sample.trained & kept for sample, kept in zip(samples, credit.keep, strict=True)]
    ends = np.cumsum([mask.sum() for mask in masks])
    chosen = np.zeros(ends[-1], dtype=np.float32)
    if len(chosen):
        draws = [np.random.default_rng(sample.seed).random(len(sample)) for sample in samples]
        columns: list[Sequence[NDArray[Any]]] = [credit.tokens, [sample.sampled for sample in samples], draws]
        advantages, logprobs, draw = (
            np.concatenate([row[mask] for row, mask in zip(rows, masks, strict=True)], dtype=np.float64)
            for rows in columns
        )
        place = order((advantages - advantages.mean()) * (logprobs - logprobs.mean()), draw)
        first = np.argsort(place, kind="stable")[: max(1, int(share * len(place)))]
        chosen[first[np.isfinite(place[first])]] = 1.0
    rows = []
    for mask, values in zip(masks, np.split(chosen, ends[:-1]), strict=True):
        row = np.zeros(len(mask), dtype=np.float32)
        row[mask] = values
        rows.append(row)
    return {SELECTED: rows}
