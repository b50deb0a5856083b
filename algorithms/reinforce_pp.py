"""REINFORCE++ (arXiv 2501.03262): no critic, no group; token rewards-to-go, whitened over the whole batch.

A token's reward is its negative KL penalty, plus the outcome on the last token. `baseline: group` first subtracts the
group's mean from the outcome (the paper's REINFORCE++-baseline).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional import kl
from algorithms.functional.advantages import Outcomes, group_relative, token_advantages
from algorithms.functional.kl import Estimator
from algorithms.functional.returns import on_last_token, reinforce_plus_plus
from algorithms.surrogate import KLPlace, SurrogateAlgorithm, SurrogateConfig
from rlkit.experience.section import Coefficient


class ReinforcePP(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        samples_per_prompt: int = Field(default=1, ge=1)
        baseline: Literal["none", "group"] = "none"
        """Subtracted from the outcome: nothing, or the group's mean."""
        gamma: float = Field(default=1.0, gt=0, le=1)
        """Discount per trained token."""
        kl_coefficient: Coefficient = 0.01
        """Weight of the KL penalty to the reference policy (OpenRLHF's script); 0 loads none."""
        kl_in: KLPlace = "reward"
        """Where the penalty is applied: in each token's reward (paper) or in the loss (its baseline form)."""
        kl_estimator: Estimator = "k1"

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2 if self.config.baseline == "group" else 1)

    def normalises(self) -> bool:
        return True

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        rewards, metrics = self.outcome_rewards(outcomes)
        keep = outcomes.valid
        if self.config.baseline == "group":
            rewards, keep = group_relative(rewards, outcomes.valid, outcomes.group, normalize_by_std=False)
        token_rewards = on_last_token(rewards, outcomes.masks)
        divergence, measured = self.token_kl(experience, outcomes)
        if divergence is not None:
            token_rewards = kl.penalise(token_rewards, divergence, self.kl_coefficient)
        white = reinforce_plus_plus(token_rewards, outcomes.masks, keep, gamma=self.config.gamma)
        metrics = {
            **metrics,
            **measured,
            "advantage/return_mean": white.mean,
            "advantage/return_std": white.variance**0.5,
        }
        return token_advantages(white.tokens, keep, outcomes.masks, metrics)
