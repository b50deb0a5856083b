"""Small rewards to combine: what they say about a response stands in its text, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import Reward, RewardConfig, RewardNeeds, TrainableReward, UpdateWhen
from rlkit.experience import Group, GroupScores, PreferencePair, Score
from rlkit.experience.types import SpanReward


class Word(Reward):
    """The number that is the response's word at `place`; `x` there is invalid, `!` raises."""

    class Config(RewardConfig):
        """Options."""

        place: int = 0
        """Which word."""
        pairs: bool = False
        """Also prefer the first sample to the second with probability 0.9."""
        broken: str = ""
        """Whether check() finds this missing."""

    @classmethod
    def check(cls, config: Any) -> list[str]:
        return [f"reward.broken={config.broken}: no such folder"] if config.broken else []

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [self._group(group) for group in groups]

    def _group(self, group: Group) -> GroupScores:
        pairs = (PreferencePair(0, 1, 0.9),) if self.config.pairs else ()
        return GroupScores(tuple(self._one(sample.text) for sample in group.samples), pairs)

    def _one(self, text: str) -> Score:
        word = text.split()[self.config.place]
        if word == "!":
            raise RuntimeError(f"word {self.config.place} is on fire")
        if word == "x":
            return Score.invalid("unreadable: it is an x", trace="saw an x")
        return Score(float(word), components={"twice": 2 * float(word)}, trace=f"read {word}")


class Several(Word):
    """The mean of all words, which are its ensemble."""

    def _one(self, text: str) -> Score:
        numbers = tuple(float(word) for word in text.split())
        return Score(sum(numbers) / len(numbers), ensemble=numbers)


class Answered(Word):
    """Word, for prompts with an answer and a rubric."""

    @classmethod
    def needs(cls, config: Any) -> RewardNeeds:
        return RewardNeeds(answer=True, columns=("rubric",))


class Steps(Reward):
    """Every word is a step of one token: its number as token reward, or as span reward, without an outcome."""

    class Config(RewardConfig):
        """Options."""

        spans: bool = False
        """Span rewards instead of token rewards."""

    @classmethod
    def gives_process_rewards(cls, config: Any) -> bool:
        return True

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [GroupScores(tuple(self._one(sample.text) for sample in group.samples)) for group in groups]

    def _one(self, text: str) -> Score:
        numbers = np.array([float(word) for word in text.split()], dtype=np.float32)
        if self.config.spans:
            return Score(None, span_rewards=tuple(SpanReward(i, i + 1, float(n)) for i, n in enumerate(numbers)))
        return Score(None, token_rewards=numbers)


class Learner(TrainableReward):
    """Its value is `bias` plus the first word; an update raises the bias by the mean value it is shown."""

    class Config(RewardConfig):
        """Options."""

        moment: str = "after"
        """When it learns."""

    bias = 0.0

    @classmethod
    def update_when(cls, config: Any) -> UpdateWhen:
        return config.moment  # type: ignore[no-any-return]

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [GroupScores(tuple(self._one(sample.text) for sample in group.samples)) for group in groups]

    def _one(self, text: str) -> Score:
        word = text.split()[0]
        return Score.invalid("unreadable: x") if word == "x" else Score(self.bias + float(word))

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        shown = [score.value for group in groups for _, score in group.scored() if score.valid]
        self.bias += float(np.mean([value for value in shown if value is not None]))
        self.version += 1
        return {"learner/bias": self.bias}

    def state_dict(self) -> Mapping[str, Any]:
        return {"bias": self.bias, "version": self.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bias, self.version = state["bias"], state["version"]


class Weighty(Word):
    """Has an option that every part has."""

    class Config(Word.Config):
        """Options."""

        weight: float = 1.0
        """Its own."""
