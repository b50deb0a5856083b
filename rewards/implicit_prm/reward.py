"""`reward=implicit_prm`: an outcome reward, and beta * log(pi_phi / pi_ref) for every token (arXiv 2412.01981).

pi_phi starts as a copy of pi_ref and learns from outcomes during the run (PRIME, arXiv 2502.01456).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits, TrainableReward
from rewards.implicit_prm.config import ImplicitPRMConfig
from rewards.parts import load_part, outcome_problems, with_outcome
from rlkit.experience import Group, GroupScores, Sample, Score
from rlkit.experience.extras import lacking

if TYPE_CHECKING:
    from torch import Tensor

    from rewards.implicit_prm.model import ImplicitModel


class ImplicitPRM(TrainableReward):
    """An outcome reward with log-ratios as process rewards. `start` creates a DeepSpeed engine in this process."""

    Config: ClassVar[type[RewardConfig]] = ImplicitPRMConfig

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._outcome: Reward | None = None
        if config.outcome is not None:
            kind, options = load_part(config.outcome)
            self._outcome = kind(options, context)
        self._model: ImplicitModel | None = None

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        own = RewardTraits(
            judges_texts=False,
            joins_tokens=True,
            process_rewards=True,
            update_when=config.update,
            follows_policy=config.reference == "policy",
        )
        return own if config.outcome is None else with_outcome(own, config.outcome)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        from rlkit.models.folder import ModelFolderError, check_model_folder

        messages = [*super().check(config), *(lacking("peft", "lora") if config.lora is not None else [])]
        for name in ("model_path", "reference_path"):
            path = getattr(config, name)
            try:
                if path is not None:
                    check_model_folder(path)
            except ModelFolderError as error:
                messages.append(f"reward.{name}: {error}")
        if config.outcome is not None:
            messages += outcome_problems(config.outcome, config.timeout_seconds)
            if config.update != "none" and cls.traits(config).raw_scores:
                messages.append(
                    "reward.outcome: gives raw model scores, but the implicit PRM learns from labels from 0 to 1; use "
                    "rewards.combined.reward.CombinedReward with it as a part and shaping [par] or [min_max]"
                )
        return messages

    def start(self) -> None:
        """Load both models, and check that equal weights give log-ratios of zero."""
        from rewards.implicit_prm.model import ImplicitModel  # torch and DeepSpeed load only where a reward runs

        if self.config.offload and self.context.device == "cpu":
            raise ValueError("reward.offload=true: this reward runs on the CPU, from where nothing can be offloaded")
        if self._outcome is not None:
            self._outcome.start()
        self._model = ImplicitModel(self.config, self.context)

    @property
    def model(self) -> ImplicitModel:
        if self._model is None:
            raise RuntimeError("the implicit PRM was used before start()")
        return self._model

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Score; the value is the outcome (possibly invalid), or the sum of the token rewards over trained tokens."""
        if self._outcome is not None:
            return self._with_process_rewards(groups, self._outcome.score(groups))
        rewards = iter(self.model.token_rewards(groups))
        return [GroupScores(tuple(_alone(next(rewards), sample) for sample in group.samples)) for group in groups]

    def rescore(self, groups: Sequence[Group]) -> list[GroupScores]:
        outcomes = [GroupScores(tuple(score for _, score in group.scored())) for group in groups]
        return self._with_process_rewards(groups, outcomes)

    def _with_process_rewards(self, groups: Sequence[Group], outcomes: Sequence[GroupScores]) -> list[GroupScores]:
        rewards = iter(self.model.token_rewards(groups))
        return [
            GroupScores(
                tuple(
                    _joined(score, next(rewards), sample)
                    for score, sample in zip(scores.samples, group.samples, strict=True)
                ),
                scores.pairs,
            )
            for group, scores in zip(groups, outcomes, strict=True)
        ]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Train on the outcomes of scored groups; return metrics `prm/...`."""
        metrics = self.model.update(groups)
        self.version += 1
        return metrics

    def policy_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.set_reference(weights)

    def save(self, folder: Path) -> None:
        """Save the model; elsewhere, `reward.model_path=FOLDER` (with reference_path) scores with it."""
        self.model.save(folder)

    def state_dict(self) -> Mapping[str, Any]:
        return {"version": self.version, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        self.model.load_state_dict(state["model"])

    def close(self) -> None:
        if self._outcome is not None:
            self._outcome.close()


def _alone(rewards: np.ndarray, sample: Sample) -> Score:
    if not np.isfinite(rewards).all():
        return Score.invalid("not_finite: a log-ratio of the implicit PRM is not finite")
    total = float(rewards[sample.trained].sum())
    return Score(value=total, token_rewards=rewards, components={"implicit_prm": total})


def _joined(outcome: Score, rewards: np.ndarray, sample: Sample) -> Score:
    if not outcome.valid:
        return outcome
    if not np.isfinite(rewards).all():
        return Score.invalid("not_finite: a log-ratio of the implicit PRM is not finite", outcome.trace)
    return Score(
        value=outcome.value,
        token_rewards=rewards,
        components={**outcome.components, "implicit_prm": float(rewards[sample.trained].sum())},
        trace=outcome.trace,
    )
