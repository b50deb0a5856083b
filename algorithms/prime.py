"""PRIME: process rewards from an implicit PRM that is trained on outcomes during the run (arXiv 2502.01456).

Outcome and process rewards have separate baselines in the group; their weighted returns are whitened over the batch.
Estimators: RLOO (the paper's choice), GRPO and REINFORCE.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import Bool, Float64, Outcomes, token_advantages
from algorithms.functional.prime import (
    Combined,
    combine,
    grpo,
    last_token_share,
    length_correlation,
    normalise,
    prime_rloo,
    reinforce,
)
from algorithms.functional.step_credit import Steps
from algorithms.surrogate import KLPlace, SurrogateAlgorithm, SurrogateConfig
from rlkit.experience.section import Coefficient


class PRIME(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        samples_per_prompt: int = Field(default=4, ge=1)
        """Responses sampled for each prompt (K)."""
        estimator: Literal["rloo", "grpo", "reinforce"] = "rloo"
        """How both halves are compared with the group."""
        mode: Literal["strict", "official", "verl"] = "strict"
        """Process baseline and coefficients: the paper's text, or one of the two codebases (estimator=rloo)."""
        normaliser: Literal["none", "global_max_return", "global_std"] = "global_max_return"
        """Divisor of process rewards, computed over the whole batch; their scale (beta) then cancels."""
        process_coefficient: Coefficient = 1.0
        """Weight of the process half."""
        outcome_coefficient: Coefficient = 1.0
        """Weight of the outcome half; after whitening, only the ratio of the two weights matters."""
        process_gamma: float = Field(default=1.0, gt=0, le=1)
        """Discount per token of the process half."""
        kl_in: KLPlace = "loss"
        """Only loss: a KL penalty in the reward does not reach PRIME's returns."""

        @model_validator(mode="after")
        def _prime_options_act(self) -> Self:
            if self.kl_in == "reward":
                raise ValueError("kl_in=reward has no effect on PRIME's returns; use kl_in=loss")
            if self.mode != "strict" and self.estimator != "rloo":
                raise ValueError(f"mode={self.mode} needs estimator=rloo; with {self.estimator}, leave mode=strict")
            if self.mode != "strict" and (self.process_coefficient, self.outcome_coefficient) != (1.0, 1.0):
                raise ValueError(
                    f"mode={self.mode} has its own coefficients; leave process_coefficient and outcome_coefficient at 1"
                )
            if self.mode == "verl" and self.process_gamma != 1.0:
                raise ValueError("mode=verl has no discount; leave process_gamma=1")
            if self.mode == "official" and self.normaliser == "none":
                raise ValueError(
                    "mode=official with normaliser=none would need log-ratios without beta; choose a normaliser"
                )
            if self.process_coefficient == self.outcome_coefficient == 0:
                raise ValueError("process_coefficient and outcome_coefficient are both 0: nothing would be learnt")
            return self

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), min_samples_per_prompt=2, process_rewards=True)

    def credit(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        rewards, shaping = self.outcome_rewards(outcomes)
        process = Steps.of(experience).on_last_tokens()
        combined = self._combined(process, rewards, outcomes)
        keep = outcomes.valid if self.config.estimator == "reinforce" else outcomes.valid & _compared(outcomes)
        metrics = {
            **shaping,
            **combined.metrics,
            "prime/return_length_correlation": length_correlation(combined.returns, outcomes.masks, keep),
            "prime/last_token_share": last_token_share(process, outcomes.masks, keep),
        }
        finite = {name: value for name, value in metrics.items() if np.isfinite(value)}
        return token_advantages(combined.advantages, keep, outcomes.masks, finite)

    def _combined(self, process: list[Float64], rewards: Float64, outcomes: Outcomes) -> Combined:
        config, rest = self.config, (outcomes.masks, outcomes.group, outcomes.valid)
        if config.estimator == "rloo":
            # The rewards already include beta: with beta 1 they are what strict mode and verl's use, and official's up
            # to a factor that its normaliser cancels.
            return prime_rloo(
                process,
                rewards,
                *rest,
                mode=config.mode,
                beta=1.0,
                normaliser=config.normaliser,
                process_coefficient=config.process_coefficient,
                outcome_coefficient=config.outcome_coefficient,
                process_gamma=config.process_gamma,
            )
        scaled, _ = normalise(process, outcomes.masks, outcomes.valid, config.normaliser)
        estimator = grpo if config.estimator == "grpo" else reinforce
        terms = estimator(scaled, rewards, *rest, process_gamma=config.process_gamma)
        return combine(
            terms,
            outcomes.masks,
            process_coefficient=config.process_coefficient,
            outcome_coefficient=config.outcome_coefficient,
        )


def _compared(outcomes: Outcomes) -> Bool:
    counts = np.bincount(outcomes.group, weights=outcomes.valid.astype(np.float64))
    return np.asarray(counts[outcomes.group] >= 2)
