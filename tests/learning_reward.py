"""A reward that learns and follows the policy, whose values tell what it has learnt and which weights it has."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.base import RewardConfig, TrainableReward, UpdateWhen
from rlkit.experience import Group, GroupScores, Score


class Learning(TrainableReward):
    """Every value is 100 x updates + the version of the policy's weights."""

    class Config(RewardConfig):
        """Options."""

        script: str
        """Folder where a file raise-, die- or hang-<method> says how often it does so."""
        learns: bool = True
        """Whether it learns."""

    policy = 0

    @classmethod
    def update_when(cls, config: Any) -> UpdateWhen:
        return "after" if config.learns else "none"

    @classmethod
    def follows_policy(cls, config: Any) -> bool:
        return True

    def _meet(self, method: str) -> None:
        for order in ("raise", "die", "hang"):
            file = Path(self.config.script) / f"{order}-{method}"
            times = int(file.read_text()) if file.exists() else 0
            if not times:
                continue
            file.write_text(str(times - 1))
            if order == "hang":
                time.sleep(2)
                return
            if order == "die":
                os._exit(9)
            raise RuntimeError("the model is hot")

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        self._meet("score")
        value = 100.0 * self.version + self.policy
        return [GroupScores(tuple(Score(value) for _ in group.samples)) for group in groups]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        self._meet("update")
        self.version += 1
        return {"test/updates": float(self.version)}

    def policy_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._meet("follow")
        self.policy = version

    def state_dict(self) -> Mapping[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
