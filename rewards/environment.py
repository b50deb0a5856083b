"""`reward=environment`: what the environment gave for each turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from rewards.base import Reward, RewardConfig, RewardTraits
from rlkit.experience import Group, GroupScores, Sample, Score
from rlkit.experience.types import SpanReward


class EnvironmentReward(Reward):
    """What the environment gave: the turns' rewards as one value, and one by one.

    Components: `success`, where the environment says so, `turns`, and `malformed` (calls that could not be read).
    """

    class Config(RewardConfig):
        value: Literal["sum", "last", "discounted", "none"] = "sum"
        """Of the turns' rewards. last: that of the last turn; discounted: the sum of discount^turn x reward; none: no
        value, for algorithms that learn from turns alone, or add up value and process rewards, as PPO does."""
        discount: float = Field(default=0.95, ge=0, le=1)
        """value=discounted: factor per turn."""
        malformed_cost: float = Field(default=0.0, ge=0)
        """Taken off a turn's reward for each of its calls that cannot be read (0.1 in GiGPO's scripts). A bonus for
        good calls would pay for more turns."""

        @model_validator(mode="after")
        def _discount_acts(self) -> EnvironmentReward.Config:
            if self.value != "discounted" and self.discount != type(self).model_fields["discount"].default:
                raise ValueError(f"discount has no effect with reward.value={self.value}")
            return self

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        value = config.value != "none"
        return RewardTraits(
            judges_texts=False,
            uses_gpu=False,
            environment=True,
            process_rewards=True,
            process_in_value=value,
            outcome_rewards=value,
        )

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [GroupScores(tuple(self._score(sample) for sample in group.samples)) for group in groups]

    def _score(self, sample: Sample) -> Score:
        episode = sample.episode
        if episode is None:
            return Score.invalid("no_episode: no environment played this response")
        turns = [span for span in sample.spans if span.kind == "turn" and span.role == "assistant"]
        faults = [int(turn.data.get("malformed", 0)) for turn in turns]
        rewards = [
            float(turn.data.get("reward", 0.0)) - self.config.malformed_cost * count
            for turn, count in zip(turns, faults, strict=True)
        ]
        success = {} if episode.success is None else {"success": float(episode.success)}
        return Score(
            self._value(rewards),
            span_rewards=tuple(
                SpanReward(turn.start, turn.end, reward) for turn, reward in zip(turns, rewards, strict=True)
            ),
            components={**success, "turns": float(len(turns)), "malformed": float(sum(faults))},
            trace=f"ended: {episode.ended}; rewards of turns: {', '.join(f'{reward:g}' for reward in rewards)}",
        )

    def _value(self, rewards: Sequence[float]) -> float | None:
        if self.config.value == "none":
            return None
        if self.config.value == "last":
            return rewards[-1] if rewards else 0.0
        discount = self.config.discount if self.config.value == "discounted" else 1.0
        return float(sum(discount**turn * reward for turn, reward in enumerate(rewards)))
