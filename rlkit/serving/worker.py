"""The process that hosts a reward: a Ray actor around any Reward class."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.base import Reward, RewardContext, TrainableReward
from rlkit.config.parts import import_part
from rlkit.experience import Group, GroupScores
from rlkit.experience.scores import (
    ScoreReport,
    attach_scores,
    invalid_groups,
    played,
    report_on,
    with_broken,
    with_greedy,
    without_greedy,
)

if TYPE_CHECKING:
    from rlkit.weights.bundle import WeightBundle  # torch is loaded only for rewards that need it

Groups = Group | Sequence[Group]
"""As held by an object reference of the rollout."""


class RewardWorker:
    """Hosts one Reward; works without Ray, too."""

    def __init__(
        self, target: str, options: Mapping[str, Any], context: RewardContext, log_path: str | None = None
    ) -> None:
        """`options` are the fields of the reward's Config; `log_path` gets this process's output and log."""
        if log_path is not None:
            from rlkit.tracking.logs import actor_logging

            actor_logging(log_path)
        kind = import_part("reward", target)
        self._reward: Reward = kind(kind.Config(**options), context)

    def start(self) -> int:
        self._reward.start()
        return os.getpid()

    def score(self, *batches: Groups) -> list[Any]:
        """Return the batches with scores, in the same shapes, and a ScoreReport; if the reward raises, None and its
        traceback."""
        start = time.perf_counter()
        originals = [group for batch in batches for group in _as_list(batch)]
        try:
            scored = self._scored([with_greedy(group) for group in originals], self._reward.score)
        except Exception:
            return [*(None for _ in batches), ScoreReport(error=traceback.format_exc(limit=20))]
        report = report_on(scored, time.perf_counter() - start)
        scored = [without_greedy(group, original) for group, original in zip(scored, originals, strict=True)]
        return [*_same_shapes(batches, scored), report]

    def learn(self, groups: Sequence[Group], rescore: bool) -> tuple[dict[str, float], list[Group] | None]:
        """Return a trainable reward's metrics and, if `rescore`, the groups with new scores."""
        if not isinstance(self._reward, TrainableReward):
            raise TypeError(f"{type(self._reward).__name__} is not a TrainableReward")
        metrics = self._reward.update(groups)
        if not rescore:
            return metrics, None  # the caller has them: no need to send all tokens back
        scored = self._scored([with_greedy(group) for group in groups], self._reward.rescore)
        return metrics, [without_greedy(group, original) for group, original in zip(scored, groups, strict=True)]

    def _scored(
        self, groups: Sequence[Group], judge: Callable[[Sequence[Group]], Sequence[GroupScores]]
    ) -> list[Group]:
        """Episodes whose environment broke are invalid whatever the reward is, which does not see them."""
        least = functools.cache(lambda: max(1, type(self._reward).traits(self._reward.config).samples))
        asked = [played(group, least) for group in groups]
        left = [group for group in asked if group is not None]
        scored = iter(attach_scores(left, judge(left)) if left else ())
        return [
            with_broken(None if ask is None else next(scored), group) for ask, group in zip(asked, groups, strict=True)
        ]

    def follow(self, bundle: WeightBundle) -> None:
        assert isinstance(self._reward, TrainableReward)
        self._reward.policy_weights(bundle.version, bundle.tensors())

    def save(self, folder: str) -> None:
        assert isinstance(self._reward, TrainableReward)
        self._reward.save(Path(folder))

    def save_state(self, file: str) -> None:
        import torch

        assert isinstance(self._reward, TrainableReward)
        torch.save(dict(self._reward.state_dict()), file)

    def load_state(self, file: str) -> None:
        """Only tensors and plain values are read, never pickled code."""
        import torch

        assert isinstance(self._reward, TrainableReward)
        self._reward.load_state_dict(torch.load(file, weights_only=True))

    def close(self) -> None:
        self._reward.close()


def mark_invalid(reason: str, *batches: Groups) -> list[Any]:
    """Like RewardWorker.score, for batches that no worker could score."""
    originals = [group for batch in batches for group in _as_list(batch)]
    scored = invalid_groups(map(with_greedy, originals), reason)
    scored = [without_greedy(group, original) for group, original in zip(scored, originals, strict=True)]
    return [*_same_shapes(batches, scored), report_on(scored, 0.0)]


def _as_list(batch: Groups) -> Sequence[Group]:
    return [batch] if isinstance(batch, Group) else batch


def _same_shapes(batches: Sequence[Groups], groups: Sequence[Group]) -> list[Groups]:
    remaining = iter(groups)
    return [
        next(remaining) if isinstance(batch, Group) else [next(remaining) for _ in range(len(batch))]
        for batch in batches
    ]
