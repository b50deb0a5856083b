"""`reward=environment`: the rewards that the environment gave for each turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from rewards.base import Reward, RewardConfig, RewardTraits
from rlkit.experience import Group, GroupScores, Sample, Score, Span
from rlkit.experience.types import SpanReward


class EnvironmentReward(Reward):
    """The environment's rewards for the turns, combined into one value and also turn by turn.

    Components: `success` if the environment reports it, `turns`, and `malformed` (calls that could not be read).
    """

    class Config(RewardConfig):
        value: Literal["sum", "last", "discounted", "none"] = "sum"
        """How the turns' rewards become one value. last: the last turn's; discounted: sum of discount^turn x reward;
        none: no value, for algorithms that learn only from turns, or that add value and process rewards, like PPO."""
        discount: float = Field(default=0.95, ge=0, le=1)
        """value=discounted: factor per turn."""
        malformed_cost: float = Field(default=0.0, ge=0)
        """Subtracted from a turn's reward for each call that cannot be read (0.1 in GiGPO's scripts). It is a cost
        because a bonus for good calls would reward taking more turns."""
        per_turn: bool = True
        """Also give each turn's reward. false: only the value, for use alongside a reward that judges turns."""
        progress: str | None = None
        """Name of an environment metric (`Step.metrics`) that measures the episode's progress, 0 before the first turn.
        Each turn also earns `progress_weight` times the increase of the metric."""
        progress_weight: float = 1.0
        """Weight of the increase in `progress`."""
        progress_kept: bool = True
        """For `progress`. false: the last turn pays it all back, so the ranking of policies is unchanged
        (potential-based shaping). The turns' rewards then differ, but their sum does not."""

        @model_validator(mode="after")
        def _options_act(self) -> EnvironmentReward.Config:
            def changed(name: str) -> bool:
                return bool(getattr(self, name) != type(self).model_fields[name].default)

            if self.value != "discounted" and changed("discount"):
                raise ValueError(f"discount has no effect with reward.value={self.value}")
            if self.progress is None and (changed("progress_weight") or changed("progress_kept")):
                raise ValueError("progress_weight and progress_kept have no effect without progress=METRIC")
            if not self.per_turn and self.value == "none":
                raise ValueError("value=none and per_turn=false leave nothing to give")
            if not self.per_turn and not self.progress_kept and self.value == "sum":
                raise ValueError("progress that is paid back has no effect on the sum of an episode's turns")
            return self

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        value = config.value != "none"
        return RewardTraits(
            judges_texts=False,
            uses_gpu=False,
            environment=True,
            process_rewards=config.per_turn,
            process_in_value=value,
            outcome_rewards=value,
        )

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        return [GroupScores(tuple(self._score(sample) for sample in group.samples)) for group in groups]

    def _score(self, sample: Sample) -> Score:
        episode = sample.episode
        if episode is None:
            return Score.invalid("no_episode: no environment played this response")
        turns = sample.turns
        known = dict.fromkeys(name for turn in turns for name in turn.data.get("metrics", {}))
        if self.config.progress is not None and self.config.progress not in known:
            has = ", ".join(known) or "none"
            return Score.invalid(f"no_progress: the environment gave no metric {self.config.progress}; it gave {has}")
        faults = [int(turn.data.get("malformed", 0)) for turn in turns]
        rewards = [
            float(turn.data.get("reward", 0.0)) - self.config.malformed_cost * count + risen
            for turn, count, risen in zip(turns, faults, self._progress(turns), strict=True)
        ]
        success = {} if episode.success is None else {"success": float(episode.success)}
        return Score(
            self._value(rewards),
            span_rewards=tuple(
                SpanReward(turn.start, turn.end, reward)
                for turn, reward in zip(turns, rewards, strict=True)
                if self.config.per_turn
            ),
            components={**success, "turns": float(len(turns)), "malformed": float(sum(faults))},
            trace=f"ended: {episode.ended}; rewards of turns: {', '.join(f'{reward:g}' for reward in rewards)}",
        )

    def _progress(self, turns: Sequence[Span]) -> list[float]:
        """Return what each turn earns by progress (Ng et al. 1999; if it is not kept, the final potential is 0)."""
        config, before, risen = self.config, 0.0, list[float]()
        for turn in turns:
            now = turn.data.get("metrics", {}).get(config.progress, before)
            risen.append(config.progress_weight * (now - before))
            before = now
        if risen and not config.progress_kept:
            risen[-1] -= config.progress_weight * before
        return risen

    def _value(self, rewards: Sequence[float]) -> float | None:
        if self.config.value == "none":
            return None
        if self.config.value == "last":
            return rewards[-1] if rewards else 0.0
        discount = self.config.discount if self.config.value == "discounted" else 1.0
        return float(sum(discount**turn * reward for turn, reward in enumerate(rewards)))
