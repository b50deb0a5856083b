"""PPO with a critic (arXiv 1707.06347; for language models arXiv 2203.02155).

Rewards stand on tokens: the outcome on the last trained one, process rewards where a reward gives them, and, with
`kl_in=reward`, minus the KL of every token. Advantages: GAE on the critic's values, whitened over the batch. Loss: the
clipped surrogate; the critic regresses on the returns with clipped values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience, LossOutput, ValueLossInputs
from algorithms.functional import kl
from algorithms.functional.prime import token_rewards
from algorithms.functional.returns import Ragged, explained_variance, float64, gae, whiten
from algorithms.outcomes import Outcomes, outcomes, token_advantages
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig

if TYPE_CHECKING:
    from torch import Tensor


class PPO(SurrogateAlgorithm):
    """See the module."""

    class Config(SurrogateConfig):
        """Defaults as in POLAR's and most published language-model runs: gamma = lambda = 1, clip 0.2."""

        samples_per_prompt: int = Field(default=1, ge=1)
        """Responses sampled for each prompt; the critic is the baseline, so one is enough."""
        gamma: float = Field(default=1.0, gt=0, le=1)
        """Discount per token."""
        gae_lambda: float = Field(default=1.0, ge=0, le=1)
        """Of generalised advantage estimation: 1 uses whole returns, 0 one step."""
        whiten_advantages: bool = True
        """Mean 0 and variance 1 over the trained tokens of the whole batch."""
        value_clip: float | None = Field(default=0.2, gt=0)
        """A value that moved further in this update gets no gradient; null: no clipping."""
        process_coefficient: float = Field(default=1.0, ge=0)
        """Weight of token process rewards, where the reward gives them."""
        kl_in: Literal["loss", "reward"] = "reward"
        """Where the penalty is; in the reward (arXiv 2203.02155 eq. 2) the critic sees it."""
        kl_estimator: Literal["k1", "k2", "k3"] = "k1"
        """Of the KL per token."""

    def needs(self) -> AlgorithmNeeds:
        """A critic, and what a KL penalty needs."""
        return replace(super().needs(), critic=True)

    def normalises(self) -> bool:
        """By the spread over the batch."""
        return bool(self.config.whiten_advantages)

    def credit(self, experience: Experience) -> Advantages:
        """GAE over token rewards; returns are the critic's targets."""
        if experience.values is None:
            raise ValueError("PPO needs the critic's values in the Experience (needs().critic)")
        found = outcomes(experience)
        rewards, metrics = self._token_rewards(experience, found)
        values = float64(experience.values)
        credit = gae(rewards, values, found.masks, gamma=self.config.gamma, lam=self.config.gae_lambda)
        tokens = credit.advantages
        if self.config.whiten_advantages:
            tokens = whiten(tokens, found.masks, found.valid).tokens
        made = token_advantages(tokens, found.valid, found.masks, metrics)
        return replace(
            made,
            returns=[row.astype(np.float32) for row in credit.returns],
            metrics={**made.metrics, **_value_metrics(values, credit.returns, found)},
        )

    def _token_rewards(self, experience: Experience, found: Outcomes) -> tuple[Ragged, dict[str, float]]:
        outcome, metrics = self.shaped(found)
        process = [
            np.zeros(len(mask))
            if score.token_rewards is None
            else self.config.process_coefficient * score.token_rewards
            for mask, score in zip(
                found.masks, (s for group in experience.groups for _, s in group.scored()), strict=True
            )
        ]
        rewards: Ragged = token_rewards(process, outcome, found.masks, found.valid)
        divergence, measured = self.kl_of_tokens(experience, found)
        if divergence is not None:
            rewards = kl.penalised(rewards, divergence, self.kl_coefficient)
        return rewards, {**metrics, **measured}

    def value_loss(self, inputs: ValueLossInputs) -> LossOutput:
        """Half the squared error with clipped values, averaged over tokens."""
        from algorithms.functional.losses import clipped_value_loss

        rows, clipped = clipped_value_loss(inputs.values, inputs.old_values, inputs.returns, self.config.value_clip)

        def mean(values: Tensor) -> Tensor:
            return (values * inputs.mask).sum() / inputs.denominators.tokens

        return LossOutput(loss=mean(rows), sums={"critic/clip_share": mean(clipped)})


def _value_metrics(values: Ragged, returns: Ragged, found: Outcomes) -> dict[str, float]:
    kept = [(v[m], r[m]) for v, r, m, k in zip(values, returns, found.masks, found.valid, strict=True) if k]
    if not kept:
        return {}
    value, target = (float(np.concatenate(part).mean()) for part in zip(*kept, strict=True))
    explained = explained_variance(values, returns, found.masks, found.valid)
    metrics = {"critic/value_mean": value, "critic/return_mean": target}
    return metrics if np.isnan(explained) else {**metrics, "critic/explained_variance": explained}
