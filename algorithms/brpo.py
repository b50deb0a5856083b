"""BRPO: bootstrapped relative policy optimisation, for judges that compare (Writing-Zero, arXiv 2506.00103).

One random sample of each group is the reference: A_i = +1 if sample i beats it under all voting conditions, else -1;
A_ref = 0. A group with |sum_i A_i| / G > 0.6 is dropped. Loss: PPO's clipped surrogate. Wins come from preferences
(`reward=judge reward.mode=pairwise`), or from higher rewards in groups without any.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Bool, Outcomes, spread, token_advantages
from algorithms.functional.estimators import against_reference
from algorithms.functional.losses import Aggregation
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig


class BRPO(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        samples_per_prompt: int = Field(default=16, ge=1)
        max_skew: float = Field(default=0.6, gt=0, le=1)
        """Drop groups in which |sum of advantages| exceeds this share of their samples."""
        win_probability: float = Field(default=1.0, gt=0.5, le=1)
        """Preferences with at least this probability are wins; 1: a judge asked in both orders agrees both times."""
        aggregation: Aggregation = "sequence_mean_token_mean"

        @model_validator(mode="after")
        def _only_comparisons_count(self) -> Self:
            if self.kl_in == "reward":
                raise ValueError("kl_in=reward has no effect on BRPO, which only compares samples; use kl_in=loss")
            if self.by_length:
                raise ValueError(f"{self.by_length} has no effect on BRPO, which only compares samples")
            return self

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2)

    def normalises(self) -> bool:
        return True

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        reference = draw_references(experience, outcomes)
        wins = wins_over(experience, outcomes, reference, self.config.win_probability)
        relative, keep = against_reference(
            wins, reference, outcomes.valid, outcomes.group, max_skew=self.config.max_skew
        )
        metrics = {"brpo/dropped_share": 1.0 - float(keep[reference].mean()) if reference.any() else 0.0}
        if (judged := outcomes.valid & ~reference).any():
            metrics["brpo/win_share"] = float(wins[judged].mean())
        return token_advantages(spread(relative, outcomes.masks), keep, outcomes.masks, metrics)


def draw_references(experience: Experience, outcomes: Outcomes) -> Bool:
    """[B] True for each group's valid sample with the smallest seed; seeds are hashes, so the draw is uniform and
    repeatable."""
    seeds = [sample.seed for group in experience.groups for sample in group.samples]
    reference = np.zeros(len(seeds), dtype=np.bool_)
    for g in np.unique(outcomes.group[outcomes.valid]):
        reference[min(np.flatnonzero((outcomes.group == g) & outcomes.valid), key=seeds.__getitem__)] = True
    return reference


def wins_over(experience: Experience, outcomes: Outcomes, reference: Bool, win_probability: float) -> Bool:
    wins = np.zeros(len(reference), dtype=np.bool_)
    for g, group in enumerate(experience.groups):
        members = np.flatnonzero(outcomes.group == g)
        for index in np.flatnonzero(reference[members]):
            if group.scores is not None and group.scores.pairs:
                for pair in group.scores.pairs:
                    if pair.loser == index and pair.probability >= win_probability:
                        wins[members[pair.winner]] = True
            else:
                wins[members] = outcomes.rewards[members] > outcomes.rewards[members[index]]
    return wins
