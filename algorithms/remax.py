"""ReMax (arXiv 2310.10505): REINFORCE whose baseline is the reward of the greedy response to the same prompt.

Advantage: the sample's reward minus the greedy response's, equal for all its tokens. One sample per prompt is enough;
the greedy response is sampled and scored beside it and never trained on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Bool, Float64, against_greedy
from algorithms.functional.returns import spread
from algorithms.outcomes import outcomes, token_advantages
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig


class ReMax(SurrogateAlgorithm):
    """See the module."""

    class Config(SurrogateConfig):
        """One response per prompt, log-probs summed over it, as in the paper's algorithm 1."""

        samples_per_prompt: int = Field(default=1, ge=1)
        """Responses sampled for each prompt, besides the greedy one."""
        kl_in: Literal["loss", "reward"] = "reward"
        """Where the penalty is: taken off the sampled response's reward, or in the loss."""
        kl_estimator: Literal["k1", "k2", "k3"] = "k1"
        """Of the KL per token. k1 has no gradient in expectation, so it belongs in the reward."""
        aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"] = (
            "sequence_mean_token_sum"
        )
        """How token losses become one number; the paper sums the log-probs of a response."""

    def needs(self) -> AlgorithmNeeds:
        """A greedy response to every prompt."""
        return replace(super().needs(), greedy_response=True)

    def credit(self, experience: Experience) -> Advantages:
        """Outcome rewards above the greedy response's, spread over each sample's tokens."""
        found = outcomes(experience)
        rewards, metrics = self.sample_rewards(experience, found)
        greedy, judged = greedy_rewards(experience)
        advantages, keep = against_greedy(rewards, found.valid, greedy[found.group], judged[found.group])
        if judged.any():
            metrics["reward/greedy_mean"] = float(greedy[judged].mean())
        return token_advantages(spread(advantages, found.masks), keep, found.masks, metrics)


def greedy_rewards(experience: Experience) -> tuple[Float64, Bool]:
    """([G] reward of each group's greedy response, 0 where there is none; [G] whether it was judged).

    Raises ValueError if a group came without a greedy response: the sampler was not asked for it.
    """
    scores = []
    for group in experience.groups:
        if group.greedy is None or group.scores is None:
            raise ValueError(f"group {group.id} has no scored greedy response (needs().greedy_response)")
        scores.append(group.scores.greedy)
    values = [score.value if score is not None and score.valid else None for score in scores]
    judged = np.array([value is not None for value in values], dtype=np.bool_)
    return np.array([0.0 if value is None else value for value in values], dtype=np.float64), judged
