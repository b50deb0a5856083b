"""`reward=implicit_prm`: an outcome reward, and beta * log(pi_phi / pi_ref) for every token (arXiv 2412.01981).

pi_phi starts as a copy of pi_ref and is trained during the run on the outcome of every response (PRIME, arXiv
2502.01456); no step labels. The outcome comes from another reward (`outcome`, by default the rule verifier) and is the
score's value; the process rewards are its token rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits, TrainableReward, UpdateWhen
from rewards.parts import load_part
from rlkit.experience import Group, GroupScores, Score

if TYPE_CHECKING:
    from torch import Tensor

    from rewards.implicit_prm.model import ImplicitModel

Objective = Literal["ce", "dpo", "nca", "kto"]


class ImplicitPRM(TrainableReward):
    """See the module. The first `start` makes a DeepSpeed engine in the reward's process."""

    class Config(RewardConfig):
        """Defaults are PRIME's (specs of its script and paper), the learning rate's scale aside."""

        model_path: str = "embedded:policy"
        """Folder of the causal language model that pi_phi starts from: usually the policy's own."""
        reference_path: str | None = None
        """Folder of the frozen pi_ref; null: the same as `model_path`."""
        outcome: dict[str, Any] | None = Field(default={"_target_": "rewards.verifiers.math.RuleReward"})
        """The reward that labels outcomes: `_target_` and its fields; its values should lie in 0 to 1. null: there is
        none, and a response's value is the model's own score, beta * its summed log-ratios (then update=none)."""
        reference: Literal["frozen", "policy"] = "frozen"
        """frozen: pi_ref never changes; policy: it is the policy of each moment, so that rewards measure pi_phi against
        that (its log-probs are taken here, at temperature 1; costs one transfer of the weights per step)."""
        beta: float = Field(default=0.05, gt=0)
        """Scale of the log-ratios, in the rewards and in the objective."""
        objective: Objective = "ce"
        """ce: each response against its label, soft labels allowed; dpo, nca: pairs inside a group; kto: unpaired."""
        update: UpdateWhen = "after"
        """after: a step's scores are all taken before the model learns from it; before: it learns, then scores."""
        learning_rate: float = Field(default=1e-6, gt=0)
        """Constant learning rate of AdamW."""
        minibatch_groups: int = Field(default=64, ge=1)
        """Groups per optimizer step; the groups of a training step are dealt out in order."""
        max_grad_norm: float = Field(default=10.0, gt=0)
        """Gradients are clipped to this norm."""
        tokens_per_microbatch: int = Field(default=16384, ge=1)
        """Tokens that one forward and backward pass takes."""
        heldout_groups: int = Field(default=16, ge=0)
        """Groups of the first steps that the model never learns from: its accuracy on them is shown (at most a quarter
        of a step's groups is set aside)."""
        offload: bool = False
        """CUDA only: keep both models and the optimizer in CPU memory while nothing is scored or learnt."""

        @model_validator(mode="after")
        def _options_fit(self) -> Self:
            if self.outcome is None and self.update != "none":
                raise ValueError("outcome=null leaves nothing to learn from; set update=none as well")
            if self.reference == "policy" and self.reference_path is not None:
                raise ValueError("reference_path has no effect with reference=policy")
            return self

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._outcome: Reward | None = None
        if config.outcome is not None:
            kind, options = load_part(config.outcome)
            self._outcome = kind(options, context)
        self._model: ImplicitModel | None = None

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """Needs what its outcome reward does; gives a reward per token."""
        own = RewardTraits(process_rewards=True, update_when=config.update, follows_policy=config.reference == "policy")
        if config.outcome is None:
            return own
        try:
            kind, options = load_part(config.outcome)
        except ValueError:  # `check` says what is wrong with it
            return own
        outcome = kind.traits(options)
        return replace(
            own,
            references=outcome.references,
            answer=outcome.answer,
            columns=outcome.columns,
            samples=outcome.samples,
        )

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Whether the models are there, and whether the outcome reward can be made and finds what it needs."""
        from rlkit.config.model_folder import ModelFolderError, check_model_folder
        from rlkit.config.parts import PartError

        messages = super().check(config)
        for name in ("model_path", "reference_path"):
            path = getattr(config, name)
            try:
                if path is not None:
                    check_model_folder(path)
            except ModelFolderError as error:
                messages.append(f"reward.{name}: {error}")
        if config.outcome is None:
            return messages
        try:
            kind, options = load_part(config.outcome)
        except PartError as error:
            messages.append(f"reward.outcome._target_: {error}")
        except ValidationError as error:
            messages += [
                f"reward.outcome.{'.'.join(map(str, details['loc']))}: {details['msg']}" for details in error.errors()
            ]
        else:
            messages += [f"reward.outcome: {message}" for message in kind.check(options)]
        return messages

    def start(self) -> None:
        """Load both models, compare them (equal weights must give log-ratios of zero), start the outcome reward."""
        from rewards.implicit_prm.model import ImplicitModel  # torch and DeepSpeed load only where a reward runs

        if self.config.offload and self.context.device == "cpu":
            raise ValueError("reward.offload=true: this reward runs on the CPU, from where nothing can be offloaded")
        if self._outcome is not None:
            self._outcome.start()
        self._model = ImplicitModel(self.config, self.context)

    @property
    def model(self) -> ImplicitModel:
        """The loaded model."""
        if self._model is None:
            raise RuntimeError("the implicit PRM was used before start()")
        return self._model

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """beta * log-ratio per token; the value is the outcome (and invalid where that is), or the summed rewards."""
        if self._outcome is not None:
            return self._with_process_rewards(groups, self._outcome.score(groups))
        rewards = iter(self.model.token_rewards(groups))
        return [GroupScores(tuple(_alone(next(rewards)) for _ in group.samples)) for group in groups]

    def rescore(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Fresh process rewards for groups whose outcomes are known."""
        outcomes = [GroupScores(tuple(score for _, score in group.scored())) for group in groups]
        return self._with_process_rewards(groups, outcomes)

    def _with_process_rewards(self, groups: Sequence[Group], outcomes: Sequence[GroupScores]) -> list[GroupScores]:
        rewards = iter(self.model.token_rewards(groups))
        return [
            GroupScores(tuple(_joined(score, next(rewards)) for score in scores.samples), scores.pairs)
            for scores in outcomes
        ]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Train on the outcomes of scored groups."""
        metrics = self.model.update(groups)
        self.version += 1
        return metrics

    def policy_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace pi_ref."""
        self.model.set_reference(weights)

    def save(self, folder: Path) -> None:
        """pi_phi with its tokenizer; `reward.model_path=FOLDER` (and reference_path) scores with it elsewhere."""
        self.model.save(folder)

    def state_dict(self) -> Mapping[str, Any]:
        """Weights, optimizer, version."""
        return {"version": self.version, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of state_dict."""
        self.version = state["version"]
        self.model.load_state_dict(state["model"])

    def close(self) -> None:
        """End the outcome reward."""
        if self._outcome is not None:
            self._outcome.close()


def _alone(rewards: np.ndarray) -> Score:
    """The model's own judgement of a response, as a scorer for best-of-N."""
    if not np.isfinite(rewards).all():
        return Score.invalid("not_finite: a log-ratio of the implicit PRM is not finite")
    total = float(rewards.sum())
    return Score(value=total, token_rewards=rewards, components={"implicit_prm": total})


def _joined(outcome: Score, rewards: np.ndarray) -> Score:
    if not outcome.valid:
        return outcome
    if not np.isfinite(rewards).all():
        return Score.invalid("not_finite: a log-ratio of the implicit PRM is not finite", outcome.trace)
    return Score(
        value=outcome.value,
        token_rewards=rewards,
        components={**outcome.components, "implicit_prm": float(rewards.sum())},
        trace=outcome.trace,
    )
