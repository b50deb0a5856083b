"""The policy loss and its options, and changes to rewards before the advantages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from algorithms.base import Advantages, Algorithm, AlgorithmNeeds, Experience, LossInputs, LossOutput
from algorithms.functional import kl, losses
from algorithms.functional.advantages import Float64, Outcomes, overlong_penalty
from algorithms.functional.surrogates import CLIP_OPTIONS, SURROGATES, make_surrogate, surrogate_parameters
from algorithms.steering import Steered
from algorithms.surrogate_config import KLPlace, SurrogateConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KLPlace", "SurrogateAlgorithm", "SurrogateConfig"]


class SurrogateAlgorithm(Algorithm):
    Config = SurrogateConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._surrogate = make_surrogate(config.loss, config.loss_options)
        self._parameters = surrogate_parameters(self._surrogate)
        self._steered = Steered.of(config)

    @property
    def kl_coefficient(self) -> float:
        return self._steered.kl

    def observe(self, metrics: Mapping[str, float]) -> None:
        self._steered = self._steered.after(metrics)

    def state_dict(self) -> dict[str, Any]:
        return self._steered.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steered = self._steered.restored(state)

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
        """Whether the loss of a token is a multiple of its advantage: it is not where a subclass or a user's surrogate
        computes it, nor with further terms."""
        own = any(
            getattr(type(self), name) is not getattr(SurrogateAlgorithm, name) for name in ("loss", "_surrogate_rows")
        )
        surrogate = self.config.loss in SURROGATES and getattr(self._surrogate, "linear", True)
        return surrogate and not (own or penalty_in_loss or self._steered.bonus)

    def advantages(self, experience: Experience) -> Advantages:
        credit = self.credit(experience)
        if hasattr(self._surrogate, "select"):
            credit = replace(credit, extras={**credit.extras, **self._surrogate.select(experience, credit)})
        weights, metrics = self._steered.weights(), self._steered.metrics()
        return replace(credit, scalars={**credit.scalars, **weights}, metrics={**credit.metrics, **metrics})

    @abstractmethod
    def credit(self, experience: Experience) -> Advantages:
        """Return one advantage per response token; mostly `token_advantages(spread(per_sample, outcomes.masks),
        ...)`."""

    def outcome_rewards(self, outcomes: Outcomes) -> tuple[Float64, dict[str, float]]:
        longest, rewards = self.config.overlong_max_tokens, outcomes.rewards
        if self.config.truncated_reward is not None:
            rewards = np.where(outcomes.truncated, self.config.truncated_reward, rewards)
        if longest is None:
            return rewards, {}
        penalty = overlong_penalty(outcomes.lengths, longest, longest * self.config.overlong_buffer_share)
        mean = float(penalty[outcomes.valid].mean()) if outcomes.valid.any() else 0.0
        return rewards + penalty, {"reward/overlong_penalty": mean}

    def token_kl(self, experience: Experience, outcomes: Outcomes) -> tuple[list[Float64] | None, dict[str, float]]:
        """Ragged KL estimates if the penalty is in the reward, else None, and metrics with their mean over trained
        tokens."""
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
            trained = inputs.mask > 0  # no sampler gave log-probs of the others
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
            if weights is not None:  # this is also an expectation over the policy's samples
                divergence = divergence * weights
            sums["kl/reference"] = share(divergence)
            if config.kl_in == "loss":
                loss = loss + inputs.scalars.get("kl_coefficient", config.kl_coefficient) * mean(divergence)
        if bonus := inputs.scalars.get("entropy_coefficient", config.entropy_coefficient):
            loss = loss - bonus * mean(inputs.entropy)
        return LossOutput(loss=loss, sums=sums, rows=rows)

    def _ratio(self, inputs: LossInputs) -> dict[str, Tensor]:
        """[R] ratio of each token's probability to that under the policy that the surrogate compares with, if any."""
        bases = [getattr(inputs, name) for name in ("rollout_logprobs", "old_logprobs") if name in self._parameters]
        return {"ratio": losses.clamped(inputs.logprobs.detach() - bases[-1]).exp()} if bases else {}

    def _surrogate_rows(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        arguments = {name: getattr(self.config if name in CLIP_OPTIONS else inputs, name) for name in self._parameters}
        rows, binds = self._surrogate(**arguments)
        if not rows.shape == binds.shape == inputs.logprobs.shape:
            raise ValueError(
                f"loss={self.config.loss} must return two tensors of shape {list(inputs.logprobs.shape)}, the token "
                f"losses and where clipping binds; it returned {list(rows.shape)} and {list(binds.shape)}"
            )
        return rows, binds
