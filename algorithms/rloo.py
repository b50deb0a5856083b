"""RLOO: REINFORCE leave-one-out (arXiv 2402.14740).

Advantage: the sample's reward minus the mean of the other samples of its group, equal for all its tokens. Loss: with
one optimizer step per batch the gradient of the clipped surrogate is REINFORCE's; with more it is clipped as in PPO.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import leave_one_out
from algorithms.functional.returns import spread
from algorithms.outcomes import outcomes, token_advantages
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig


class RLOO(SurrogateAlgorithm):
    """See the module."""

    class Config(SurrogateConfig):
        """Defaults are the paper's, where it gives them."""

        samples_per_prompt: int = Field(default=4, ge=1)
        """Responses sampled for each prompt (the paper: 2 and 4)."""
        kl_in: Literal["loss", "reward"] = "reward"
        """Where the penalty is: the paper takes the sample's log-ratio off its reward."""
        kl_estimator: Literal["k1", "k2", "k3"] = "k1"
        """Of the KL per token. k1 has no gradient in expectation, so it belongs in the reward."""
        aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"] = (
            "sequence_mean_token_sum"
        )
        """How token losses become one number; the paper's action is the whole sample: log-probs are summed."""

    def needs(self) -> AlgorithmNeeds:
        """A sample is compared with at least one other."""
        return replace(super().needs(), min_samples_per_prompt=2)

    def credit(self, experience: Experience) -> Advantages:
        """Leave-one-out outcome rewards, spread over each sample's tokens."""
        found = outcomes(experience)
        rewards, metrics = self.sample_rewards(experience, found)
        relative, keep = leave_one_out(rewards, found.valid, found.group)
        return token_advantages(spread(relative, found.masks), keep, found.masks, metrics)
