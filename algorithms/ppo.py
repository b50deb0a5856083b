"""PPO with a critic (arXiv 1707.06347; for language models arXiv 2203.02155).

Token rewards: the outcome on the last trained token, process rewards, and with `kl_in=reward` minus each token's KL.
Advantages: GAE over tokens, or over turns and then over each turn's tokens (`credit=turns`), whitened over the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience, LossOutput, ValueLossInputs
from algorithms.functional import kl
from algorithms.functional.advantages import Outcomes, Ragged, token_advantages
from algorithms.functional.kl import Estimator
from algorithms.functional.losses import clipped_value_loss
from algorithms.functional.prime import token_rewards
from algorithms.functional.returns import explained_variance, float64, gae, turn_gae, whiten
from algorithms.functional.step_credit import Steps
from algorithms.surrogate import KLPlace, SurrogateAlgorithm, SurrogateConfig
from rlkit.experience.section import Coefficient
from rlkit.experience.steps import turn_ends

if TYPE_CHECKING:
    from torch import Tensor


class PPO(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        samples_per_prompt: int = Field(default=1, ge=1)
        """Responses sampled for each prompt; one is enough with a critic."""
        gamma: float = Field(default=1.0, gt=0, le=1)
        """Discount per token; with credit=turns, within a turn."""
        credit: Literal["token", "turns"] = "token"
        """token: GAE over all tokens; turns: over the turns of an episode, then over the tokens of each turn."""
        turn_gamma: float = Field(default=0.95, gt=0, le=1)
        """credit=turns: discount per turn."""
        gae_lambda: float = Field(default=1.0, ge=0, le=1)
        """Lambda of generalised advantage estimation: 1 uses whole returns, 0 a single step."""
        whiten_advantages: bool = True
        """Give advantages mean 0 and variance 1 over the batch's trained tokens."""
        value_clip: float | None = Field(default=0.2, gt=0)
        """Largest change of a value in an update before its loss is clipped; null: no clipping."""
        process_coefficient: Coefficient = 1.0
        """Weight of process rewards; a step's reward is on its last trained token."""
        kl_in: KLPlace = "reward"
        """Where the penalty is applied; in the reward (arXiv 2203.02155 eq. 2) the critic sees it."""
        kl_estimator: Estimator = "k1"

        @model_validator(mode="after")
        def _turns_act(self) -> Self:
            if self.credit == "token" and not self._is_default("turn_gamma"):
                raise ValueError("turn_gamma has no effect with credit=token")
            if self.credit == "turns" and self.gamma == self.gae_lambda == self.turn_gamma == 1:
                raise ValueError("credit=turns has no effect with gamma, gae_lambda and turn_gamma of 1; lower one")
            return self

    def needs(self) -> AlgorithmNeeds:
        reads = self.config.process_coefficient > 0
        return replace(
            super().needs(),
            critic=True,
            turns=self.config.credit == "turns",
            reads_process_rewards=reads,
            outcome_rewards=not reads,
        )

    def normalises(self) -> bool:
        return bool(self.config.whiten_advantages)

    def credit(self, experience: Experience) -> Advantages:
        if experience.values is None:
            raise ValueError("PPO needs the critic's values in the Experience (needs().critic)")
        outcomes = Outcomes.of(experience, needed=self.needs().outcome_rewards)
        rewards, metrics = self._token_rewards(experience, outcomes)
        values = float64(experience.values)
        discounts = {"gamma": self.config.gamma, "lam": self.config.gae_lambda}
        if self.config.credit == "turns":
            ends = [turn_ends(sample) for group in experience.groups for sample in group.samples]
            credit = turn_gae(rewards, values, outcomes.masks, ends, turn_gamma=self.config.turn_gamma, **discounts)
        else:
            credit = gae(rewards, values, outcomes.masks, **discounts)
        tokens = credit.advantages
        if self.config.whiten_advantages:
            tokens = whiten(tokens, outcomes.masks, outcomes.valid).tokens
        advantages = token_advantages(tokens, outcomes.valid, outcomes.masks, metrics)
        return replace(
            advantages,
            returns=[row.astype(np.float32) for row in credit.returns],
            metrics={**advantages.metrics, **_value_metrics(values, credit.returns, outcomes)},
        )

    def _token_rewards(self, experience: Experience, outcomes: Outcomes) -> tuple[Ragged, dict[str, float]]:
        outcome, metrics = self.outcome_rewards(outcomes)
        steps = Steps.of(experience, needed=False).on_last_tokens()
        process = [self.config.process_coefficient * row for row in steps]
        rewards: Ragged = token_rewards(process, outcome, outcomes.masks, outcomes.valid)
        divergence, measured = self.token_kl(experience, outcomes)
        if divergence is not None:
            rewards = kl.penalise(rewards, divergence, self.kl_coefficient)
        return rewards, {**metrics, **measured}

    def value_loss(self, inputs: ValueLossInputs) -> LossOutput:
        rows, clipped = clipped_value_loss(inputs.values, inputs.old_values, inputs.returns, self.config.value_clip)

        def mean(values: Tensor) -> Tensor:
            return (values * inputs.mask).sum() / inputs.denominators.tokens

        return LossOutput(loss=mean(rows), sums={"critic/clip_share": mean(clipped)})


def _value_metrics(values: Ragged, returns: Ragged, outcomes: Outcomes) -> dict[str, float]:
    kept = [(v[m], r[m]) for v, r, m, k in zip(values, returns, outcomes.masks, outcomes.valid, strict=True) if k]
    if not kept:
        return {}
    value, target = (float(np.concatenate(part).mean()) for part in zip(*kept, strict=True))
    explained = explained_variance(values, returns, outcomes.masks, outcomes.valid)
    metrics = {"critic/value_mean": value, "critic/return_mean": target}
    return metrics if np.isnan(explained) else {**metrics, "critic/explained_variance": explained}
