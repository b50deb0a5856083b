"""ReMax (arXiv 2310.10505): REINFORCE whose baseline is the reward of the prompt's greedy response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Bool, Float64, Outcomes, spread, token_advantages
from algorithms.functional.estimators import against_greedy
from algorithms.functional.kl import Estimator
from algorithms.functional.losses import Aggregation
from algorithms.surrogate import KLPlace, SurrogateAlgorithm, SurrogateConfig


class ReMax(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        samples_per_prompt: int = Field(default=1, ge=1)
        """Responses sampled for each prompt, besides the greedy one."""
        kl_in: KLPlace = "reward"
        kl_estimator: Estimator = "k1"
        aggregation: Aggregation = "sequence_mean_token_sum"

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), greedy_response=True)

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        rewards, metrics = self.sample_rewards(experience, outcomes)
        greedy, judged = greedy_rewards(experience)
        relative, keep = against_greedy(rewards, outcomes.valid, greedy[outcomes.group], judged[outcomes.group])
        if judged.any():
            metrics["reward/greedy_mean"] = float(greedy[judged].mean())
        return token_advantages(spread(relative, outcomes.masks), keep, outcomes.masks, metrics)


def greedy_rewards(experience: Experience) -> tuple[Float64, Bool]:
    """[G] rewards of the greedy responses, 0 if not judged; [G] whether they were judged. Raise ValueError if a group
    has none."""
    scores = []
    for group in experience.groups:
        if group.greedy is None or group.scores is None:
            raise ValueError(f"group {group.id} has no scored greedy response (needs().greedy_response)")
        scores.append(group.scores.greedy)
    values = [score.value if score is not None and score.valid else None for score in scores]
    judged = np.array([value is not None for value in values], dtype=np.bool_)
    return np.array([0.0 if value is None else value for value in values], dtype=np.float64), judged
