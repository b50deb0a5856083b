"""Options of the policy loss, and of changes to rewards before the advantages; no torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from algorithms.base import AlgorithmConfig
from algorithms.functional.kl import Estimator
from algorithms.functional.losses import Aggregation, Correction
from algorithms.functional.surrogates import CLIP_OPTIONS, find_surrogate, make_surrogate, surrogate_parameters
from rlkit.experience.section import Coefficient

KLPlace = Literal["loss", "reward"]
STALE_LARGEST_WEIGHT = 2.0
"""Largest weight of truncated importance sampling (Yao et al. 2025)."""


class SurrogateConfig(AlgorithmConfig):
    loss: str = "clipped"
    """clipped: PPO's surrogate; gspo: with the ratio of whole samples; cispo: clipped weights of log-probs;
    policy_gradient: no ratio; sapo: a soft gate; gmpo: the geometric mean of a sample's ratios; dppo: a bound on the
    divergence; clip_cov, kl_cov: hold back tokens that lower the entropy; or the dotted path of your function or
    class."""
    loss_options: dict[str, Any] | None = Field(default=None, validate_default=True)
    """Options of `loss`, if it has any: for sapo, dppo, clip_cov, kl_cov, or your class with a Config."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The ratio to the policy before the update is clipped at 1 - clip_low (1: no lower bound)."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    anchor: Literal["learner", "rollout"] = "learner"
    """Denominator of the ratio: the learner's log-probs before the update, or the sampler's, from whichever policies
    sampled."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of tokens with a negative advantage, as a multiple of it (published: 3); for loss=clipped."""
    aggregation: Aggregation = "token_mean"
    """How token losses become one number; constant_length divides by samples x `constant_length` (Dr. GRPO)."""
    constant_length: int | None = Field(default=None, ge=1)
    """Tokens; for aggregation=constant_length."""
    kl_coefficient: Coefficient = 0.0
    """Weight of the KL penalty to the reference policy; 0 loads none."""
    kl_in: KLPlace = "loss"
    """Where the penalty is applied."""
    kl_estimator: Estimator = "k3"
    """Estimator of the KL per token; in the reward use k1, whose expected gradient is 0."""
    kl_target: float | None = Field(default=None, gt=0)
    """Target KL in nats per token, towards which `kl_coefficient` is steered; null: it stays fixed."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Samples over which a KL 20 % off its target changes the coefficient by 20 % (arXiv 1909.08593)."""
    entropy_coefficient: Coefficient = 0.0
    """Weight of an entropy bonus; with `entropy_target`, its initial value."""
    entropy_target: float | None = Field(default=None, gt=0)
    """Nats per token below which the bonus is on. After each step its weight grows by `entropy_step` if the entropy
    was below, and otherwise shrinks, down to 0 (arXiv 2505.22312: 0.2); null: the bonus is always on, with a fixed
    weight."""
    entropy_step: float = Field(default=1e-4, gt=0)
    """Change of the weight per step with `entropy_target`."""
    entropy_limit: float = Field(default=0.005, gt=0)
    """Largest weight of the bonus with `entropy_target`."""
    rollout_correction: Literal["none", Correction] | None = None
    """Weights that correct for the difference between sampler and learner: truncated, 0 where too far off, or
    unchanged. sequence_*: one weight per sample, the product over its tokens; geometric_mask: leave out samples whose
    geometric mean is too far off, without weights. null: truncated at 2 with `trainer.max_staleness` above 0, else
    none."""
    largest_weight: float | None = Field(default=None, gt=0)
    """For rollout_correction=truncate (published: 2), mask (published: 5) and the per-sample corrections (products: 2
    to 10; geometric means: 1.001)."""
    smallest_weight: float | None = Field(default=None, gt=0)
    """For rollout_correction=mask (published: 0.5), sequence_mask and geometric_mask; null: no lower bound."""
    truncated_reward: float | None = None
    """Reward of a response cut off at `rollout.max_response_tokens`, instead of its own (Tulu 3: -10); null: its own.
    Filters of the buffer still see its own reward."""
    overlong_max_tokens: int | None = Field(default=None, ge=1)
    """Response length that costs a reward of 1 (DAPO); null: length costs nothing."""
    overlong_buffer_share: float = Field(default=0.2, gt=0, le=1)
    """Share of `overlong_max_tokens`, at its end, over which that cost rises from 0 (DAPO: 0.2)."""

    @field_validator("loss")
    @classmethod
    def _loss_exists(cls, name: str) -> str:
        surrogate_parameters(find_surrogate(name))
        return name

    @field_validator("loss_options")
    @classmethod
    def _loss_takes_them(cls, options: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if "loss" in info.data:
            make_surrogate(info.data["loss"], options)
        return options

    @model_validator(mode="after")
    def _every_option_acts(self) -> Self:
        parameters = surrogate_parameters(find_surrogate(self.loss))
        for name in CLIP_OPTIONS:
            if name not in parameters and not self._is_default(name):
                raise ValueError(f"{name} has no effect with loss={self.loss}")
        if self.anchor == "rollout" and (self._loss_has_the_samplers_ratio or "old_logprobs" not in parameters):
            raise ValueError(f"anchor=rollout has no effect with loss={self.loss}")
        if (self.constant_length is not None) != (self.aggregation == "constant_length"):
            raise ValueError("aggregation=constant_length and constant_length=N (tokens) go together; set both")
        if self.kl_coefficient == 0:
            for name in ("kl_in", "kl_estimator", "kl_target"):
                if not self._is_default(name):
                    raise ValueError(f"{name} has no effect with kl_coefficient=0")
        elif self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator=k1 in the loss has no gradient in expectation; use k2 or k3, or kl_in=reward"
            )
        if self.kl_target is None and not self._is_default("kl_horizon"):
            raise ValueError("kl_horizon has no effect without kl_target")
        if self.entropy_target is None:
            for name in ("entropy_step", "entropy_limit"):
                if not self._is_default(name):
                    raise ValueError(f"{name} has no effect without entropy_target")
        elif self.entropy_coefficient > self.entropy_limit:
            raise ValueError(f"entropy_coefficient starts above entropy_limit={self.entropy_limit:g}")
        bounded = self.rollout_correction not in (None, "none", "decoupled")
        if (self.largest_weight is not None) != bounded:
            raise ValueError(
                "largest_weight goes with rollout_correction=truncate, mask or one for whole samples; set both"
            )
        if self.smallest_weight is not None and not (self.rollout_correction or "").endswith("mask"):
            raise ValueError(
                "smallest_weight has no effect without rollout_correction=mask, sequence_mask or geometric_mask"
            )
        if self._measures_from_sampler and self.rollout_correction not in (None, "none"):
            ratio = "anchor=rollout" if self.anchor == "rollout" else f"loss={self.loss}"
            raise ValueError(f"rollout_correction would correct twice: the ratio of {ratio} is already to the sampler")
        if self.smallest_weight is not None and self.smallest_weight > (self.largest_weight or 0):
            raise ValueError("smallest_weight is above largest_weight: no token would be left")
        if self.overlong_max_tokens is None and not self._is_default("overlong_buffer_share"):
            raise ValueError("overlong_buffer_share has no effect without overlong_max_tokens")
        return self

    def for_staleness(self, max_staleness: int) -> Self:
        if self.rollout_correction is not None:
            return self
        if not max_staleness or self._measures_from_sampler:
            return self.model_copy(update={"rollout_correction": "none"})
        stale = {"rollout_correction": "truncate", "largest_weight": STALE_LARGEST_WEIGHT}
        return self.model_copy(update=stale)

    @property
    def by_length(self) -> str | None:
        """The option in use that changes rewards by the response's length, if any."""
        names = ("truncated_reward", "overlong_max_tokens")
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def corrects(self) -> bool:
        return self._measures_from_sampler or self.rollout_correction not in (None, "none")

    @property
    def _measures_from_sampler(self) -> bool:
        return self.anchor == "rollout" or self._loss_has_the_samplers_ratio

    @property
    def _loss_has_the_samplers_ratio(self) -> bool:
        return bool(getattr(find_surrogate(self.loss), "measures_from_sampler", False))

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == type(self).model_fields[name].default)
