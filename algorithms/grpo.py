"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

Advantage: the reward relative to the group. Loss: PPO's clipped surrogate plus a KL penalty (k3; eq. 3 and 4). Dr.
GRPO, DAPO, OPO, GPG, MaxRL, Pass@k training, GSPO, CISPO, GMPO, SAPO, DPPO, Clip-Cov and KL-Cov are settings of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Bool, Float64, Outcomes, group_relative, spread, token_advantages
from algorithms.functional.estimators import group_policy_gradient, length_weighted, mean_normalised, pass_at_k
from algorithms.functional.losses import Aggregation
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig
from rlkit.experience.section import Coefficient

Estimator = Literal["grpo", "opo", "gpg", "maxrl", "passk"]


class GRPO(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        kl_coefficient: Coefficient = 0.04
        """Weight of the KL penalty to the reference policy; 0 loads none."""
        estimator: Estimator = "grpo"
        """How a group's rewards become advantages: minus their mean (grpo), minus their length-weighted mean (opo),
        scaled up to make up for groups with equal rewards (gpg), divided by the mean (maxrl), for the best of k samples
        (passk)."""
        k: int | None = Field(default=None, ge=1)
        """Number of samples of which one must be good; for estimator=passk."""
        normalize_by_std: bool = True
        """Divide advantages by the group's standard deviation (False: Dr. GRPO); not with estimator=opo or maxrl."""
        aggregation: Aggregation = "sequence_mean_token_mean"

        @model_validator(mode="after")
        def _estimator_fits(self) -> Self:
            if (self.k is not None) != (self.estimator == "passk"):
                raise ValueError("estimator=passk and k=N go together; set both")
            if self.k is not None and self.k >= self.samples_per_prompt:
                raise ValueError(
                    f"k={self.k} must be below samples_per_prompt={self.samples_per_prompt}: "
                    "otherwise there is only one subset"
                )
            if self.estimator in ("opo", "maxrl") and not self.normalize_by_std:
                raise ValueError(f"normalize_by_std has no effect with estimator={self.estimator}")
            if self.estimator == "maxrl" and (self.kl_in == "reward" or self.overlong_max_tokens is not None):
                raise ValueError(
                    "estimator=maxrl divides by mean rewards, which penalties (kl_in=reward, overlong_max_tokens) "
                    "make negative"
                )
            if self.estimator == "maxrl" and (self.truncated_reward or 0) < 0:
                raise ValueError("estimator=maxrl divides by mean rewards, so truncated_reward cannot be negative")
            return self

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2)

    def normalises(self) -> bool:
        return {"opo": False, "maxrl": True}.get(self.config.estimator, bool(self.config.normalize_by_std))

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        rewards, metrics = self.sample_rewards(experience, outcomes)
        relative, keep = self._estimate(rewards, outcomes)
        return token_advantages(spread(relative, outcomes.masks), keep, outcomes.masks, metrics)

    def _estimate(self, rewards: Float64, outcomes: Outcomes) -> tuple[Float64, Bool]:
        samples, by_std = (rewards, outcomes.valid, outcomes.group), self.config.normalize_by_std
        match self.config.estimator:
            case "grpo":
                return group_relative(*samples, normalize_by_std=by_std)
            case "opo":
                trained = np.array([mask.sum() for mask in outcomes.masks], dtype=np.int64)
                return length_weighted(*samples, trained)
            case "gpg":
                return group_policy_gradient(*samples, normalize_by_std=by_std)
            case "maxrl":
                return mean_normalised(*samples)
            case _:
                return pass_at_k(*samples, k=self.config.k, normalize_by_std=by_std)
