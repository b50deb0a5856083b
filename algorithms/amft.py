"""AMFT: reinforcement and demonstrations in one loss, mixed by a controller (arXiv 2508.06944).

    L = (1 - mu) L_RL + mu L_SFT,    mu <- clip(mu + eta_m dU/dmu + eta_H (H* - H), mu_min, mu_max)

L_RL: GRPO's surrogate on the policy's samples; L_SFT: the likelihood of the data's responses to the same prompts; each
is a mean over its own tokens of the step. H: the policy's entropy per token of both, H* its mean over the first
`warmup_steps`. In the formula, mu rises when entropy is below its target; the paper's prose says the opposite: use
`entropy_sign=-1`.

dU/dmu is the paper's meta-gradient of the validation reward U. Here U is the mean reward of each step's fresh samples,
which have not been trained on yet, and the derivative is the secant between two windows of steps. That needs no second
backward pass and no extra samples, but gives no information while mu does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience, FloatArray, LossInputs
from algorithms.functional.losses import Aggregation
from algorithms.grpo import GRPO
from rlkit.experience.section import Coefficient

if TYPE_CHECKING:
    from torch import Tensor

LEAST_CHANGE = 1e-3
"""Smallest change of mu between two windows for which a secant is computed."""
DEMONSTRATION = "demonstration"


def controlled(
    mu: float,
    slope: float,
    entropy: float,
    target: float,
    *,
    meta_rate: float,
    entropy_rate: float,
    bounds: tuple[float, float],
) -> float:
    """Return the next mu; `slope`: dU/dmu; `bounds`: smallest and largest mu."""
    low, high = bounds
    return min(high, max(low, mu + meta_rate * slope + entropy_rate * (target - entropy)))


class AMFT(GRPO):
    class Config(GRPO.Config):
        kl_coefficient: Coefficient = 0.0
        """Weight of the KL penalty to the reference policy; 0 loads none."""
        aggregation: Aggregation = "token_mean"
        """Only token_mean: both losses are means over their own tokens."""
        mu: float = Field(default=0.5, ge=0, le=1)
        """Initial weight of the demonstrations."""
        mu_bounds: tuple[float, float] = (0.05, 0.95)
        """Smallest and largest weight of the demonstrations."""
        meta_rate: float = Field(default=0.1, ge=0)
        """eta_m: how strongly mu follows the slope of the reward."""
        meta_window: int = Field(default=5, ge=1)
        """Steps in each of the two windows whose means give the secant."""
        entropy_rate: float = Field(default=0.05, ge=0)
        """eta_H: how strongly mu follows the entropy, in nats per token."""
        entropy_sign: Literal[1, -1] = 1
        """1: the formula, more demonstrations when entropy is too low; -1: the prose, more when it is too high."""
        warmup_steps: int = Field(default=10, ge=1)
        """Steps during which mu is constant and the target entropy is measured."""

        @model_validator(mode="after")
        def _mixes(self) -> Self:
            low, high = self.mu_bounds
            if not 0 <= low <= self.mu <= high <= 1:
                raise ValueError(
                    f"mu={self.mu:g} must be within mu_bounds={low:g}, {high:g}, and both bounds within 0 and 1"
                )
            if self.aggregation != "token_mean":
                raise ValueError("aggregation must be token_mean: both losses are means over their own tokens")
            if self.kl_coefficient and self.kl_in == "loss":
                raise ValueError("a KL penalty in the loss would hold back the demonstrations; use kl_in=reward")
            return self

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mu: float = config.mu
        self.target: float | None = None
        """H*; None while it is being measured."""
        self._entropies: list[float] = []
        self._seen: list[tuple[float, float]] = []
        """(mu, U) of each step in the last two windows."""

    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), demonstrations=True)

    def advantages(self, experience: Experience) -> Advantages:
        shown = [all(sample.logprobs is None for sample in group.samples) for group in experience.groups]
        fresh = [group for group, recorded in zip(experience.groups, shown, strict=True) if not recorded]
        samples = [sample for group in experience.groups for sample in group.samples]
        demonstrated = np.repeat(shown, [len(group.samples) for group in experience.groups])
        policy, reference = (
            None if rows is None else [row for row, recorded in zip(rows, demonstrated, strict=True) if not recorded]
            for rows in (experience.policy_logprobs, experience.reference_logprobs)
        )
        credit = super().advantages(Experience(fresh, experience.step, None, policy, reference))
        keep = np.ones(len(samples), dtype=np.bool_)
        keep[~demonstrated] = credit.keep
        trained = np.array([int(sample.trained.sum()) for sample in samples], dtype=np.int64)
        sampled, given = int(trained[keep & ~demonstrated].sum()), int(trained[demonstrated].sum())
        # The loss divides by all tokens; each half must be a mean over its own.
        ours, theirs = (mu * (sampled + given) / max(1, own) for mu, own in ((1 - self.mu, sampled), (self.mu, given)))

        def with_demonstrations(own: Sequence[FloatArray], value: float) -> list[FloatArray]:
            """Rows of the fresh samples, and value x weight on the demonstrations."""
            rows = iter(own)
            return [
                np.full(len(sample), value * sample.weight, np.float32) if recorded else next(rows)
                for sample, recorded in zip(samples, demonstrated, strict=True)
            ]

        extras = {name: with_demonstrations(rows, 0.0) for name, rows in credit.extras.items()}
        marks = [np.full(len(s), mark, np.float32) for s, mark in zip(samples, demonstrated, strict=True)]
        return replace(
            credit,
            tokens=with_demonstrations([np.asarray(ours * row, np.float32) for row in credit.tokens], theirs),
            keep=keep,
            extras={**extras, DEMONSTRATION: marks},
            metrics={**credit.metrics, "amft/mu": self.mu, "amft/demonstration_tokens": float(given)},
        )

    def _surrogate_rows(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        rows, binds = super()._surrogate_rows(inputs)
        demonstrated = inputs.extras[DEMONSTRATION] > 0
        return (-inputs.advantages * inputs.logprobs).where(demonstrated, rows), binds & ~demonstrated

    def observe(self, metrics: Mapping[str, float]) -> None:
        super().observe(metrics)
        entropy, reward = metrics.get("policy/entropy"), metrics.get("reward/mean")
        if entropy is None or reward is None:
            return
        window = self.config.meta_window
        self._seen = [*self._seen, (self.mu, reward)][-2 * window :]
        if self.target is None:
            self._entropies.append(entropy)
            if len(self._entropies) == self.config.warmup_steps:
                self.target = fmean(self._entropies)
            return
        self.mu = controlled(
            self.mu,
            self._slope(),
            self.config.entropy_sign * entropy,
            self.config.entropy_sign * self.target,
            meta_rate=self.config.meta_rate,
            entropy_rate=self.config.entropy_rate,
            bounds=self.config.mu_bounds,
        )

    def _slope(self) -> float:
        window = self.config.meta_window
        if len(self._seen) < 2 * window:
            return 0.0
        (mu0, u0), (mu1, u1) = (
            (fmean(mu for mu, _ in half), fmean(u for _, u in half))
            for half in (self._seen[:window], self._seen[window:])
        )
        return (u1 - u0) / (mu1 - mu0) if abs(mu1 - mu0) >= LEAST_CHANGE else 0.0

    def state_dict(self) -> dict[str, Any]:
        own = {"mu": self.mu, "target": self.target, "entropies": self._entropies, "seen": [*map(list, self._seen)]}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.mu, self.target, self._entropies = state["mu"], state["target"], list(state["entropies"])
        self._seen = [(mu, reward) for mu, reward in state["seen"]]
