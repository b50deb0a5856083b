"""RLOO: REINFORCE leave-one-out (arXiv 2402.14740).

Advantage: the reward minus the mean of the group's other samples. Loss: the clipped surrogate, whose gradient is
REINFORCE's with one optimizer step per batch.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Outcomes, leave_one_out, spread, token_advantages
from algorithms.functional.kl import Estimator
from algorithms.functional.losses import Aggregation
from algorithms.surrogate import KLPlace, SurrogateAlgorithm, SurrogateConfig


class RLOO(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        """Defaults are the paper's; the action is the whole sample, so log-probs are summed."""

        samples_per_prompt: int = Field(default=4, ge=1)
        kl_in: KLPlace = "reward"
        kl_estimator: Estimator = "k1"
        aggregation: Aggregation = "sequence_mean_token_sum"

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2)

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        rewards, metrics = self.sample_rewards(experience, outcomes)
        relative, keep = leave_one_out(rewards, outcomes.valid, outcomes.group)
        return token_advantages(spread(relative, outcomes.masks), keep, outcomes.masks, metrics)
