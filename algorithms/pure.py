"""PURE: min-form credit for the steps of a response (arXiv 2504.15275).

A response is worth its worst step. With p_k the process reward of step k, from -1 to 1, and T a temperature,

    r_k = p_k softmax(-p / T)_k,    G_k = sum over l >= k of r_l    (T -> 0: G_1 = min_k p_k)

A token's advantage: G of its step minus a leave-one-out baseline per token, plus `outcome_coefficient` times the
outcome reward minus the mean of the others', minus the KL from there on; 0 outside of steps, as in the authors' code.
Process rewards are span rewards, or token rewards summed over the sample's spans; without spans every token is a step.
Loss: PPO's clipped surrogate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Bool, Outcomes, leave_one_out, spread, token_advantages
from algorithms.functional.kl import Estimator
from algorithms.functional.losses import Aggregation
from algorithms.functional.returns import reward_to_go
from algorithms.functional.step_credit import Steps, min_form
from algorithms.surrogate import KLPlace, SurrogateAlgorithm, SurrogateConfig
from rlkit.experience.section import Coefficient


class PURE(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        samples_per_prompt: int = Field(default=4, ge=1)
        temperature: float = Field(default=0.1, gt=0)
        """T, in units of process rewards: the smaller, the more the worst step alone counts."""
        outcome_coefficient: Coefficient = 1.0
        """Weight of the outcome reward; 0: process rewards only."""
        kl_coefficient: Coefficient = 0.001
        kl_in: KLPlace = "reward"
        kl_estimator: Estimator = "k1"
        aggregation: Aggregation = "sequence_mean_token_mean"

        @model_validator(mode="after")
        def _outcome_options_act(self) -> Self:
            if self.outcome_coefficient == 0 and self.overlong_max_tokens is not None:
                raise ValueError("overlong_max_tokens has no effect with outcome_coefficient=0")
            return self

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2, process_rewards=True)

    def credit(self, experience: Experience) -> Advantages:
        outcomes, steps, weight = Outcomes.of(experience), Steps.of(experience), self.config.outcome_coefficient
        valid = outcomes.valid if weight else _scored(experience)
        rewards, metrics = self.outcome_rewards(outcomes)
        tokens, keep = min_form(
            steps.rewards, steps.spans, outcomes.masks, valid, outcomes.group, temperature=self.config.temperature
        )
        inside = steps.masks(outcomes.masks)
        relative, _ = leave_one_out(rewards, outcomes.valid, outcomes.group)
        tokens = [row + half for row, half in zip(tokens, spread(weight * relative, inside), strict=True)]
        divergence, measured = self.token_kl(experience, outcomes)
        if divergence is not None:
            penalty = reward_to_go(divergence, outcomes.masks)
            tokens = [
                np.where(mask, row - self.kl_coefficient * cost, 0.0)
                for row, cost, mask in zip(tokens, penalty, inside, strict=True)
            ]
        kept = [row for row, k in zip(steps.rewards, keep, strict=True) if k and len(row)]
        if kept:
            measured["pure/worst_step"] = float(np.mean([row.min() for row in kept]))
            measured["pure/steps"] = float(np.mean([len(row) for row in kept]))
        return token_advantages(tokens, keep, outcomes.masks, {**metrics, **measured})


def _scored(experience: Experience) -> Bool:
    """[B] samples with a trained token and a valid score, even without an outcome."""
    return np.array(
        [score.valid and sample.trained.any() for group in experience.groups for sample, score in group.scored()],
        dtype=np.bool_,
    )
