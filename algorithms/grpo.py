"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

Advantage: the sample's reward relative to its group, equal for all its tokens. Loss: PPO's clipped surrogate plus a
KL penalty to the reference policy (k3, in the loss; eq. 3 and 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from algorithms.advantages import group_relative
from algorithms.base import (
    Advantages,
    Algorithm,
    AlgorithmConfig,
    AlgorithmNeeds,
    Experience,
    LossInputs,
    LossOutput,
)

if TYPE_CHECKING:
    from torch import Tensor


class GRPO(Algorithm):
    """See the module."""

    class Config(AlgorithmConfig):
        """Defaults are the paper's, where it gives them."""

        clip_low: float = Field(default=0.2, gt=0, lt=1)
        """The ratio to the policy before the update is clipped below at 1 - clip_low."""
        clip_high: float = Field(default=0.2, gt=0)
        """And above at 1 + clip_high."""
        kl_coefficient: float = Field(default=0.04, ge=0)
        """Weight of the KL penalty; 0 loads no reference policy."""
        normalize_by_std: bool = True
        """Divide advantages by the group's standard deviation (False: Dr. GRPO)."""
        aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"] = (
            "sequence_mean_token_mean"
        )
        """How token losses become one number."""
        entropy_coefficient: float = 0.0
        """Weight of an entropy bonus."""

    def needs(self) -> AlgorithmNeeds:
        """A group baseline needs two samples; a KL penalty needs the reference."""
        return AlgorithmNeeds(min_samples_per_prompt=2, reference_policy=self.config.kl_coefficient > 0)

    def advantages(self, experience: Experience) -> Advantages:
        """Group-relative outcome rewards, spread over each sample's tokens."""
        samples = [(g, sample, score) for g, group in enumerate(experience.groups) for sample, score in group.scored()]
        rewards = np.array([0.0 if score.value is None else score.value for _, _, score in samples])
        valid = np.array([score.valid and score.value is not None for _, _, score in samples])
        groups = np.array([g for g, _, _ in samples])
        advantages, keep = group_relative(rewards, valid, groups, normalize_by_std=self.config.normalize_by_std)
        return Advantages(
            tokens=[
                np.full(len(sample), value, dtype=np.float32)
                for (_, sample, _), value in zip(samples, advantages, strict=True)
            ],
            keep=keep,
            metrics={
                "advantage/mean_absolute": float(np.abs(advantages[keep]).mean()) if keep.any() else 0.0,
                "advantage/zero_share": float((advantages[keep] == 0).mean()) if keep.any() else 1.0,
            },
        )

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Clipped surrogate + KL penalty - entropy bonus."""
        from algorithms import losses

        def mean(rows: Tensor) -> Tensor:
            return losses.aggregate(
                rows,
                inputs.mask,
                inputs.sequence,
                inputs.num_sequences,
                inputs.denominators,
                self.config.aggregation,
            )

        surrogate, clipped = losses.clipped_surrogate(
            inputs.logprobs, inputs.old_logprobs, inputs.advantages, self.config.clip_low, self.config.clip_high
        )
        loss = mean(surrogate)
        tokens = inputs.denominators.tokens
        sums = {
            "policy/clip_share": (clipped * inputs.mask).sum() / tokens,
            "policy/entropy": (inputs.entropy * inputs.mask).sum() / tokens,
        }
        if inputs.reference_logprobs is not None:
            divergence = losses.k3_divergence(inputs.logprobs, inputs.reference_logprobs)
            loss = loss + self.config.kl_coefficient * mean(divergence)
            sums["kl/reference"] = (divergence * inputs.mask).sum() / tokens
        if self.config.entropy_coefficient:
            loss = loss - self.config.entropy_coefficient * mean(inputs.entropy)
        return LossOutput(loss=loss, sums=sums)
