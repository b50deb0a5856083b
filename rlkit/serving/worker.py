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
    checked_scores,
    invalid_scores,
    played,
    report_on,
    with_broken,
    with_greedy,
    without_greedy,
)
from rlkit.models.folder import enter_working_folder

if TYPE_CHECKING:
    from rlkit.weights.bundle import WeightBundle  # torch is loaded only for rewards that need it

Batch = Sequence[Group]
"""The content of an object reference from the rollout."""


class RewardWorker:
    """Hosts one Reward; also works without Ray."""

    def __init__(
        self, target: str, options: Mapping[str, Any], context: RewardContext, log_path: str | None = None
    ) -> None:
        """`options` are the fields of the reward's Config; `log_path` gets this process's output and log."""
        if log_path is not None:
            from rlkit.tracking.logs import actor_logging

            actor_logging(log_path)
        enter_working_folder()
        kind = import_part("reward", target)
        self._reward: Reward = kind(kind.Config(**options), context)

    def start(self) -> int:
        self._reward.start()
        return os.getpid()

    def score(self, chosen: Sequence[str] | None, *batches: Batch) -> tuple[list[GroupScores], ScoreReport]:
        """Return the scores of all groups of the batches, or of those with the `chosen` ids in that order, and a
        report; if the reward raises, no scores and its traceback."""
        start = time.perf_counter()
        groups = _chosen(chosen, batches)
        try:
            scored = self._scored(groups, self._reward.score)
        except Exception:
            return [], ScoreReport(error=traceback.format_exc(limit=20))
        return scored, report_on(scored, time.perf_counter() - start)

    def learn(
        self, scores: Mapping[str, GroupScores], rescore: bool, *batches: Batch
    ) -> tuple[dict[str, float], list[GroupScores] | None]:
        """Let a trainable reward learn from those groups of the batches whose ids are in `scores`.

        Returns its metrics and, if `rescore`, new scores in the order of `scores`.
        """
        if not isinstance(self._reward, TrainableReward):
            raise TypeError(f"{type(self._reward).__name__} is not a TrainableReward")
        groups = [group.with_scores(scores[group.id]) for group in _chosen(list(scores), batches)]
        metrics = self._reward.update(groups)
        return metrics, self._scored(groups, self._reward.rescore) if rescore else None

    def _scored(
        self, originals: Sequence[Group], judge: Callable[[Sequence[Group]], Sequence[GroupScores]]
    ) -> list[GroupScores]:
        """Judge groups, including greedy responses. Episodes whose environment broke are invalid for any reward, which
        does not see them."""
        least = functools.cache(lambda: max(1, type(self._reward).traits(self._reward.config).samples))
        groups = [with_greedy(group) for group in originals]
        asked = [played(group, least) for group in groups]
        left = [group for group in asked if group is not None]
        scored = iter(checked_scores(left, judge(left)) if left else ())
        return [
            without_greedy(with_broken(None if ask is None else next(scored), group), original)
            for ask, group, original in zip(asked, groups, originals, strict=True)
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
        """Load a reward's state; only tensors and plain values are read, never pickled code."""
        import torch

        assert isinstance(self._reward, TrainableReward)
        self._reward.load_state_dict(torch.load(file, weights_only=True))

    def close(self) -> None:
        self._reward.close()


def mark_invalid(reason: str, chosen: Sequence[str] | None, *batches: Batch) -> tuple[list[GroupScores], ScoreReport]:
    """Like RewardWorker.score, for groups that no worker could score."""
    scores = [invalid_scores(group, reason) for group in _chosen(chosen, batches)]
    return scores, report_on(scores, 0.0)


def _chosen(ids: Sequence[str] | None, batches: Sequence[Batch]) -> list[Group]:
    groups = [group for batch in batches for group in batch]
    if ids is None:
        return groups
    named = {group.id: group for group in groups}
    return [named[id] for id in ids]
