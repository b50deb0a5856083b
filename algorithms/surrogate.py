"""The policy loss and its options, and rewards before the advantages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from algorithms.base import Advantages, Algorithm, AlgorithmConfig, AlgorithmNeeds, Experience, LossInputs, LossOutput
from algorithms.functional import kl, losses
from algorithms.functional.advantages import Float64, Outcomes, overlong_penalty
from algorithms.functional.kl import Estimator
from algorithms.functional.losses import Aggregation, Correction
from algorithms.functional.surrogates import (
    CLIP_OPTIONS,
    SURROGATES,
    find_surrogate,
    make_surrogate,
    surrogate_parameters,
)
from rlkit.experience.section import Coefficient

if TYPE_CHECKING:
    from torch import Tensor

KLPlace = Literal["loss", "reward"]
STALE_LARGEST_WEIGHT = 2.0
"""Of truncated importance sampling (Yao et al. 2025)."""


class SurrogateConfig(AlgorithmConfig):
    loss: str = "clipped"
    """clipped: PPO's surrogate; gspo: with the ratio of whole samples; cispo: clipped weights of log-probs;
    policy_gradient: no ratio; sapo: a soft gate; gmpo: the geometric mean of a sample's ratios; dppo: a bound on the
    divergence; clip_cov, kl_cov: hold back what lowers the entropy; or the dotted path of your function or class."""
    loss_options: dict[str, Any] | None = Field(default=None, validate_default=True)
    """Options of `loss`, if it has any: sapo, dppo, clip_cov, kl_cov, or your class with a Config."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The ratio to the policy before the update is clipped at 1 - clip_low (1: no lower bound)."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    anchor: Literal["learner", "rollout"] = "learner"
    """What the ratio is to: the learner's log-probs before the update, or the sampler's, of whatever policies."""
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
    """Of the KL per token; use k1, whose expected gradient is 0, in the reward."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats per token to which `kl_coefficient` steers the KL; null: it stays fixed."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Samples over which a KL 20 % off its target changes the coefficient by 20 % (arXiv 1909.08593)."""
    entropy_coefficient: Coefficient = 0.0
    """Weight of an entropy bonus."""
    rollout_correction: Literal["none", Correction] | None = None
    """Weights for the difference between sampler and learner: truncated, 0 where too far, or as they are. sequence_*:
    one weight for a whole sample, the product of its tokens'; geometric_mask: leave out samples whose geometric mean is
    too far, without weights. null: with `trainer.max_staleness` above 0 truncated at 2, else none."""
    largest_weight: float | None = Field(default=None, gt=0)
    """For rollout_correction=truncate (published: 2), mask (published: 5) and those of samples (products: 2 to 10;
    geometric means: 1.001)."""
    smallest_weight: float | None = Field(default=None, gt=0)
    """For rollout_correction=mask (published: 0.5), sequence_mask and geometric_mask; null: no lower bound."""
    overlong_max_tokens: int | None = Field(default=None, ge=1)
    """Response length that costs 1 reward (DAPO); null: length costs nothing."""
    overlong_buffer_share: float = Field(default=0.2, gt=0, le=1)
    """Share of `overlong_max_tokens`, at its end, over which that cost grows from 0 (DAPO: 0.2)."""

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
            raise ValueError("aggregation=constant_length and the tokens constant_length=N go together; set both")
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
        bounded = self.rollout_correction not in (None, "none", "decoupled")
        if (self.largest_weight is not None) != bounded:
            raise ValueError(
                "rollout_correction=truncate, mask or one of whole samples and largest_weight go together; set both"
            )
        if self.smallest_weight is not None and not (self.rollout_correction or "").endswith("mask"):
            raise ValueError(
                "smallest_weight has no effect without rollout_correction=mask, sequence_mask or geometric_mask"
            )
        if self._measures_from_sampler and self.rollout_correction not in (None, "none"):
            ratio = "anchor=rollout" if self.anchor == "rollout" else f"loss={self.loss}"
            raise ValueError(f"rollout_correction would correct twice: the ratio of {ratio} is to the sampler")
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


class SurrogateAlgorithm(Algorithm):
    Config = SurrogateConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._surrogate = make_surrogate(config.loss, config.loss_options)
        self._parameters = surrogate_parameters(self._surrogate)
        self._adaptive = (
            None
            if config.kl_target is None
            else kl.AdaptiveCoefficient(config.kl_coefficient, config.kl_target, config.kl_horizon)
        )

    @property
    def kl_coefficient(self) -> float:
        fixed: float = self.config.kl_coefficient
        return fixed if self._adaptive is None else self._adaptive.value

    def observe(self, metrics: Mapping[str, float]) -> None:
        if self._adaptive is not None and "kl/reference" in metrics:
            self._adaptive = self._adaptive.adjust(metrics["kl/reference"], int(metrics["policy/trained_samples"]))

    def state_dict(self) -> dict[str, Any]:
        return {} if self._adaptive is None else {"kl_coefficient": self._adaptive.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._adaptive is not None:
            self._adaptive = replace(self._adaptive, value=state["kl_coefficient"])

    def needs(self) -> AlgorithmNeeds:
        penalty = self.config.kl_coefficient > 0
        in_reward = penalty and self.config.kl_in == "reward"
        return AlgorithmNeeds(
            reference_policy=penalty,
            token_kl=in_reward,
            corrects_staleness=True,
            skips_zero_advantages=self._is_linear(penalty and not in_reward),
        )

    def _is_linear(self, penalty_in_loss: bool) -> bool:
        """Whether the loss of a token is a multiple of its advantage: not where a subclass or a user's surrogate
        computes it, nor with further terms."""
        own = any(
            getattr(type(self), name) is not getattr(SurrogateAlgorithm, name) for name in ("loss", "_surrogate_rows")
        )
        surrogate = self.config.loss in SURROGATES and getattr(self._surrogate, "linear", True)
        return surrogate and not (own or penalty_in_loss or self.config.entropy_coefficient)

    def advantages(self, experience: Experience) -> Advantages:
        credit = self.credit(experience)
        if hasattr(self._surrogate, "select"):
            credit = replace(credit, extras={**credit.extras, **self._surrogate.select(experience, credit)})
        if not self.config.kl_coefficient:
            return credit
        weight = {"kl_coefficient": self.kl_coefficient}
        return replace(credit, scalars=weight, metrics={**credit.metrics, "kl/coefficient": self.kl_coefficient})

    @abstractmethod
    def credit(self, experience: Experience) -> Advantages:
        """One advantage per response token; mostly `token_advantages(spread(per_sample, outcomes.masks), ...)`."""

    def outcome_rewards(self, outcomes: Outcomes) -> tuple[Float64, dict[str, float]]:
        longest = self.config.overlong_max_tokens
        if longest is None:
            return outcomes.rewards, {}
        penalty = overlong_penalty(outcomes.lengths, longest, longest * self.config.overlong_buffer_share)
        mean = float(penalty[outcomes.valid].mean()) if outcomes.valid.any() else 0.0
        return outcomes.rewards + penalty, {"reward/overlong_penalty": mean}

    def token_kl(self, experience: Experience, outcomes: Outcomes) -> tuple[list[Float64] | None, dict[str, float]]:
        """Ragged KL estimates if the penalty is in the reward, else None; and their mean over trained tokens."""
        if not self.needs().token_kl:
            return None, {}
        policy, reference = experience.policy_logprobs, experience.reference_logprobs
        if policy is None or reference is None:
            raise ValueError(
                "kl_in=reward needs log-probs of policy and reference in the Experience (needs().token_kl)"
            )
        tokens = kl.token_kl(policy, reference, outcomes.masks, self.config.kl_estimator)
        trained = [row[mask] for row, mask, valid in zip(tokens, outcomes.masks, outcomes.valid, strict=True) if valid]
        return tokens, {"kl/reference": float(np.concatenate(trained).mean())} if trained else {}

    def sample_rewards(self, experience: Experience, outcomes: Outcomes) -> tuple[Float64, dict[str, float]]:
        """[B] rewards with every penalty (the KL summed over tokens), and metrics."""
        rewards, metrics = self.outcome_rewards(outcomes)
        divergence, measured = self.token_kl(experience, outcomes)
        if divergence is not None:
            rewards = kl.penalise_samples(rewards, divergence, self.kl_coefficient)
        return rewards, {**metrics, **measured}

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Surrogate x correction + KL penalty - entropy bonus."""
        config, measured = self.config, inputs.denominators.measured

        def mean(rows: Tensor) -> Tensor:
            return losses.aggregate(
                rows,
                inputs.mask,
                inputs.sequence,
                inputs.num_sequences,
                inputs.denominators,
                config.aggregation,
                config.constant_length,
            )

        def share(rows: Tensor) -> Tensor:
            return (rows.detach() * inputs.mask).sum() / measured

        anchored = inputs
        if config.anchor == "rollout":
            trained = inputs.mask > 0  # nothing sampled the others
            anchored = replace(inputs, old_logprobs=inputs.rollout_logprobs.where(trained, inputs.old_logprobs))
        surrogate, clipped = self._surrogate_rows(anchored)
        sums = {"policy/clip_share": share(clipped), "policy/entropy": share(inputs.entropy)}
        rows = {"clipped": clipped, **self._ratio(anchored)}
        weights = None
        if config.rollout_correction not in (None, "none"):
            weights, cut = losses.rollout_weights(
                inputs.old_logprobs,
                inputs.rollout_logprobs,
                inputs.mask,
                inputs.sequence,
                inputs.num_sequences,
                config.rollout_correction,
                largest=config.largest_weight,
                smallest=config.smallest_weight,
            )
            surrogate = surrogate * weights
            sums |= {"mismatch/weight_mean": share(weights), "mismatch/weight_cut_share": share(cut)}
            rows["weight"] = weights
        loss = mean(surrogate)
        if inputs.reference_logprobs is not None:
            divergence = losses.kl_divergence(inputs.logprobs, inputs.reference_logprobs, config.kl_estimator)
            if weights is not None:  # an expectation over the policy's samples, too
                divergence = divergence * weights
            sums["kl/reference"] = share(divergence)
            if config.kl_in == "loss":
                loss = loss + inputs.scalars.get("kl_coefficient", config.kl_coefficient) * mean(divergence)
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * mean(inputs.entropy)
        return LossOutput(loss=loss, sums=sums, rows=rows)

    def _ratio(self, inputs: LossInputs) -> dict[str, Tensor]:
        """[R] of each token's probability to that of the policy which the surrogate compares with, if it does."""
        bases = [getattr(inputs, name) for name in ("rollout_logprobs", "old_logprobs") if name in self._parameters]
        return {"ratio": losses.clamped(inputs.logprobs.detach() - bases[-1]).exp()} if bases else {}

    def _surrogate_rows(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        arguments = {name: getattr(self.config if name in CLIP_OPTIONS else inputs, name) for name in self._parameters}
        rows, binds = self._surrogate(**arguments)
        if not rows.shape == binds.shape == inputs.logprobs.shape:
            raise ValueError(
                f"loss={self.config.loss} must return two tensors of shape {list(inputs.logprobs.shape)}, token losses "
                f"and where clipping binds; it returned {list(rows.shape)} and {list(binds.shape)}"
            )
        return rows, binds
