"""Credit for steps and turns: what each step of a response earns, in five published forms (`credit`).

p_k is the process reward of step k, a_i the outcome reward of sample i, c_p and c_o their coefficients. Advantage of
step k's tokens (`algorithms/functional/step_credit.py`):

- min_form (PURE, arXiv 2504.15275): c_p (sum over l >= k of p_l softmax(-p / T)_l, minus a leave-one-out baseline per
  token) + c_o (a_i - mean of the others' a). For T -> 0 a response is worth its worst step.
- loo: c_p (P_k - mean of the others' P_k) + c_o (a_i - mean of the others' a), P_k the sum over l >= k of
  gamma^(l-k) p_l, 0 after the last step. The baseline does not depend on what sample i did, so it adds no bias.
- anchor_states (GiGPO, arXiv 2505.10978): c_p (P_k - mean P of the group's steps in the same state) + c_o (a_i - mean
  of the group's a); both over their standard deviations if normalize_by_std.
- episode_plus_step (OPRL): c_p z(p_k) + c_o z(a_i); z over all steps, or all outcomes, of the group.
- turn_discounted (IGPO): r_k = c_p p_k, plus c_o a_i on the last step. norm=pooled_z: the sum over l >= k of
  gamma^(l-k) z(r_l), normalised first and then summed, so each further step adds another -mean / std of the
  group; position_mean: the sum over l >= k of r_l minus the group's mean at the same token. With pooled_z and c_o = 0
  it is the process supervision of GRPO's paper (arXiv 2402.03300 section 4.1.3).

Minus the KL from that token on, if it is in the reward; 0 outside of steps. Loss: PPO's clipped surrogate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from algorithms.base import Advantages, AlgorithmNeeds, Experience
from algorithms.functional.advantages import (
    Bool,
    Float64,
    Outcomes,
    Ragged,
    group_relative,
    leave_one_out,
    members_of_groups,
    spread,
    token_advantages,
)
from algorithms.functional.kl import Estimator
from algorithms.functional.losses import Aggregation
from algorithms.functional.returns import reward_to_go
from algorithms.functional.step_credit import (
    Steps,
    leave_one_out_to_go,
    min_form,
    minus_position_mean,
    minus_state_mean,
    pooled_z,
    to_go,
)
from algorithms.surrogate import KLPlace, SurrogateAlgorithm, SurrogateConfig
from rlkit.experience.section import Coefficient

ACTS_WITH = {
    "temperature": ("min_form",),
    "norm": ("turn_discounted",),
    "gamma": ("loo", "turn_discounted", "anchor_states"),
    "normalize_by_std": ("anchor_states",),
}


class StepCredit(SurrogateAlgorithm):
    class Config(SurrogateConfig):
        """Defaults are those of PURE."""

        samples_per_prompt: int = Field(default=4, ge=1)
        credit: Literal["min_form", "loo", "episode_plus_step", "turn_discounted", "anchor_states"] = "min_form"
        """How a step earns credit."""
        process_coefficient: Coefficient = 1.0
        """Weight of process rewards; 0: outcome only."""
        outcome_coefficient: Coefficient = 1.0
        """Weight of the outcome reward; 0: process rewards only."""
        temperature: float = Field(default=0.1, gt=0)
        """min_form: T, in units of process rewards: the smaller it is, the more only the worst step counts."""
        norm: Literal["pooled_z", "position_mean"] = "pooled_z"
        """turn_discounted: z-scores over all steps of the group, or minus the group's mean at the same position."""
        gamma: float = Field(default=1.0, gt=0, le=1)
        """loo, anchor_states, and turn_discounted with pooled_z: discount per step."""
        normalize_by_std: bool = False
        """anchor_states: divide returns and outcomes by the standard deviation of what they are compared with."""
        kl_coefficient: Coefficient = 0.001
        kl_in: KLPlace = "reward"
        kl_estimator: Estimator = "k1"
        aggregation: Aggregation = "sequence_mean_token_mean"

        @model_validator(mode="after")
        def _credit_options_act(self) -> Self:
            for name, forms in ACTS_WITH.items():
                if self.credit not in forms and not self._is_default(name):
                    raise ValueError(f"{name} has no effect with credit={self.credit}")
            if self.norm == "position_mean" and self.gamma != 1.0:
                raise ValueError("gamma has no effect with norm=position_mean")
            if self.outcome_coefficient == 0 and self.by_length:
                raise ValueError(f"{self.by_length} has no effect with outcome_coefficient=0")
            if self.process_coefficient == self.outcome_coefficient == 0:
                raise ValueError("process_coefficient and outcome_coefficient are both 0: nothing would be learnt")
            return self

    def needs(self) -> AlgorithmNeeds:
        outcomes = self.config.outcome_coefficient > 0
        return replace(
            super().needs(),
            min_samples_per_prompt=2,
            process_rewards=True,
            outcome_rewards=outcomes,
            turns=self._in_states,
        )

    @property
    def _in_states(self) -> bool:
        return bool(self.config.credit == "anchor_states")

    def normalises(self) -> bool:
        if self._in_states:
            return bool(self.config.normalize_by_std)
        scores = ("episode_plus_step", "turn_discounted")
        return self.config.credit in scores and bool(self.config.norm == "pooled_z")

    def credit(self, experience: Experience) -> Advantages:
        outcomes, steps = Outcomes.of(experience, self.config.outcome_coefficient > 0), Steps.of(experience)
        rewards, metrics = self.outcome_rewards(outcomes)
        inside = steps.inside()
        if self._in_states:
            tokens, metrics["steps/shared_state_share"] = self._over_states(
                experience, steps, rewards, outcomes, inside
            )
        else:
            tokens = self._tokens(steps, rewards, outcomes, inside)
        divergence, measured = self.token_kl(experience, outcomes)
        if divergence is not None:
            penalty = reward_to_go(divergence, outcomes.masks)
            tokens = [
                np.where(mask, row - self.kl_coefficient * cost, 0.0)
                for row, cost, mask in zip(tokens, penalty, inside, strict=True)
            ]
        keep = np.zeros(len(tokens), dtype=np.bool_)
        for members in members_of_groups(outcomes.valid, outcomes.group):
            keep[members] = True
        kept = [row for row, k in zip(steps.rewards, keep, strict=True) if k and len(row)]
        if kept:
            measured["steps/mean"] = float(np.mean([row.mean() for row in kept]))
            measured["steps/worst"] = float(np.mean([row.min() for row in kept]))
            measured["steps/count"] = float(np.mean([len(row) for row in kept]))
        return token_advantages(tokens, keep, outcomes.masks, {**metrics, **measured})

    def _tokens(self, steps: Steps, rewards: Float64, outcomes: Outcomes, inside: list[Bool]) -> list[Float64]:
        """Ragged [T_i] advantages, before the KL is subtracted."""
        config, compared = self.config, (outcomes.valid, outcomes.group)
        weight = config.outcome_coefficient
        if config.credit == "turn_discounted":
            earned = [config.process_coefficient * row for row in steps.rewards]
            for row, reward, valid in zip(earned, rewards, outcomes.valid, strict=True):
                if valid:
                    row[-1] += weight * reward
            if config.norm == "pooled_z":
                return steps.over_tokens([to_go(row, config.gamma) for row in pooled_z(earned, *compared, ddof=1)])
            return minus_position_mean(steps.over_tokens([to_go(row) for row in earned]), inside, *compared)
        if config.credit == "episode_plus_step":
            process = pooled_z(steps.rewards, *compared, ddof=0)
            outcome, _ = group_relative(rewards, *compared, normalize_by_std=True)
        else:
            outcome, _ = leave_one_out(rewards, *compared)
            if config.credit == "min_form":
                process = min_form(steps.rewards, steps.lengths(), *compared, temperature=config.temperature)
            else:
                process = leave_one_out_to_go(steps.rewards, *compared, gamma=config.gamma)
        return self._sum(steps, process, outcome, inside)

    def _over_states(
        self, experience: Experience, steps: Steps, rewards: Float64, outcomes: Outcomes, inside: list[Bool]
    ) -> tuple[list[Float64], float]:
        config, compared = self.config, (outcomes.valid, outcomes.group)
        states = Steps.states(experience, steps.spans)
        if outcomes.valid.any() and all(state is None for row in states for state in row):
            raise ValueError(
                "credit=anchor_states compares turns taken in the same state, but no turn of this step names its "
                "state; let the environment name it in Step(state=...), or use algorithm=turn_grpo, which needs none"
            )
        returns = [to_go(row, config.gamma) for row in steps.rewards]
        process, share = minus_state_mean(returns, states, *compared, normalize_by_std=config.normalize_by_std)
        outcome, _ = group_relative(rewards, *compared, normalize_by_std=config.normalize_by_std)
        return self._sum(steps, process, outcome, inside), share

    def _sum(self, steps: Steps, process: Ragged, outcome: Float64, inside: list[Bool]) -> list[Float64]:
        halves = zip(steps.over_tokens(process), spread(self.config.outcome_coefficient * outcome, inside), strict=True)
        return [self.config.process_coefficient * row + half for row, half in halves]
