"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

Advantage: the reward relative to the group. Loss: PPO's clipped surrogate plus a KL penalty (k3; eq. 3 and 4). Dr.
GRPO, DAPO, GSPO and CISPO are settings of this.
"""

from __future__ import annotations

from dataclasses import replace

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Outcomes, group_relative, spread, token_advantages
from algorithms.functional.losses import Aggregation
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig
from rlkit.experience.section import Coefficient


class GRPO(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        kl_coefficient: Coefficient = 0.04
        """Weight of the KL penalty to the reference policy; 0 loads none."""
        normalize_by_std: bool = True
        """Divide advantages by the group's standard deviation (False: Dr. GRPO)."""
        aggregation: Aggregation = "sequence_mean_token_mean"

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2)

    def normalises(self) -> bool:
        return bool(self.config.normalize_by_std)

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        rewards, metrics = self.sample_rewards(experience, outcomes)
        relative, keep = group_relative(
            rewards, outcomes.valid, outcomes.group, normalize_by_std=self.config.normalize_by_std
        )
        return token_advantages(spread(relative, outcomes.masks), keep, outcomes.masks, metrics)
