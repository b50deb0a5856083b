"""An algorithm of your own: it imitates the best responses of a group and ignores the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Outcomes, spread, token_advantages
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig


class BestOfGroup(SurrogateAlgorithm):
    """Advantage 1 for samples whose reward is the best of their group and above its mean, else 0; PPO's surrogate."""

    class Config(SurrogateConfig):
        """The surrogate's options (clipping, KL, aggregation) and one more."""

        margin: float = Field(default=0.0, ge=0)
        """How far above its group's mean the best reward must be."""

    def needs(self) -> AlgorithmNeeds:
        """Require at least two samples: the best one must be better than another."""
        return replace(super().needs(), min_samples_per_prompt=2)

    def credit(self, experience: Experience) -> Advantages:
        """Return one number per sample, the same for all its tokens."""
        outcomes = Outcomes.of(experience)
        rewards, metrics = self.sample_rewards(experience, outcomes)
        advantages, keep = np.zeros(len(rewards)), np.zeros(len(rewards), dtype=np.bool_)
        for group in np.unique(outcomes.group):
            members = np.flatnonzero((outcomes.group == group) & outcomes.valid)
            if len(members) < 2:
                continue
            keep[members] = True
            best = rewards[members].max()
            if best - rewards[members].mean() > self.config.margin:
                advantages[members] = rewards[members] == best
        return token_advantages(spread(advantages, outcomes.masks), keep, outcomes.masks, metrics)
