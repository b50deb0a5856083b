"""Rewards with more to say than a value, and one that learns: for tests of serving."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.base import Reward, RewardConfig, RewardNeeds, TrainableReward, UpdateWhen
from rlkit.experience import Group, GroupScores, PreferencePair, Score, SpanReward


class Everything(Reward):
    """Process rewards, components, members, traces and pairs; one sample of each group is invalid."""

    class Config(RewardConfig):
        """Options."""

        scale: float = 1.0
        """Multiplies the values."""

    @classmethod
    def needs(cls, config: Any) -> RewardNeeds:
        return RewardNeeds(references=True, columns=("weight",))

    @classmethod
    def gives_process_rewards(cls, config: Any) -> bool:
        return True

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [self._group(group) for group in groups]

    def _group(self, group: Group) -> GroupScores:
        scores = []
        for sample in group.samples:
            tokens, value = len(sample), self.config.scale * len(sample) / 3
            if sample.index == 1:
                scores.append(Score.invalid("odd: the second", trace="\ud800 looked at"))
                continue
            scores.append(
                Score(
                    value=value,
                    token_rewards=np.linspace(0.1, 1, tokens, dtype=np.float32),
                    span_rewards=(SpanReward(0, tokens, 0.25),),
                    components={"length": value, "logprob": float(np.nan_to_num(sample.logprobs, nan=-99).sum())},
                    ensemble=(value, value + 1),
                    trace=f"{group.prompt.columns.get('weight')} {group.prompt.references[0]}",
                )
            )
        return GroupScores(tuple(scores), (PreferencePair(0, 1, 0.75),) if len(scores) > 1 else ())


class SlowToLearn(TrainableReward):
    """Raises a TimeoutError of its own where its options say so."""

    class Config(RewardConfig):
        """Options."""

        where: str = ""

    @classmethod
    def update_when(cls, config: Any) -> UpdateWhen:
        return "before"

    def start(self) -> None:
        if self.config.where == "start":
            raise TimeoutError("the model store does not answer")

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [GroupScores((Score(float(self.version)),) * len(group.samples)) for group in groups]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        if self.config.where == "update":
            raise TimeoutError("the teacher does not answer")
        if self.config.where == "hang":
            time.sleep(1000)
        self.version += 1
        return {"learner/updates": float(self.version)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class Weighted(Reward):
    """The number in a column; raises where there is none."""

    class Config(RewardConfig):
        """Options."""

    @classmethod
    def needs(cls, config: Any) -> RewardNeeds:
        return RewardNeeds(columns=("weight",))

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [
            GroupScores((Score(float(group.prompt.columns["weight"])),) * len(group.samples))  # type: ignore[arg-type]
            for group in groups
        ]
