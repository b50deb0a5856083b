"""Judges of answers: rewards in separate processes, as Ray actors if engines run, otherwise without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rewards.base import RewardContext
from rlkit.assessment.config import Evaluating
from rlkit.config.parts import TARGET, Part
from rlkit.experience import Group
from rlkit.experience.scores import with_scores
from rlkit.serving.http.process import RewardProcess
from rlkit.serving.http.queue import BatchLimits, ScoringQueue, ServerMetrics

AT_ONCE = BatchLimits(samples=256, tokens=262144, queued_samples=2**62)


class Judge(Protocol):
    """A reward that can judge groups."""

    async def start(self) -> None: ...

    async def judge(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with their scores; where judging failed, these are invalid and have a reason."""

    async def close(self) -> None: ...


class LocalJudge:
    """Reward processes without Ray."""

    def __init__(self, reward: Mapping[str, Any], part: Part, context: RewardContext, startup_seconds: float) -> None:
        options = {key: value for key, value in reward.items() if key != TARGET}
        self._workers = [
            RewardProcess(reward[TARGET], options, context, startup_seconds, part.config.timeout_seconds)
            for _ in range(part.config.workers)
        ]
        self._queue = ScoringQueue(self._workers, AT_ONCE, ServerMetrics())

    async def start(self) -> None:
        await self._queue.start()

    async def judge(self, groups: Sequence[Group]) -> list[Group]:
        bare = [replace(group, scores=None) for group in groups]
        return with_scores(groups, await self._queue.score(bare, None))

    async def close(self) -> None:
        await self._queue.close()


class Labels:
    """A judge for recorded answers, which already have values."""

    async def start(self) -> None: ...

    async def judge(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)

    async def close(self) -> None: ...


def local_judge(evaluating: Evaluating, part: Part | None) -> Judge:
    if part is None:
        return Labels()
    config = evaluating.config
    device = config.cluster.device if part.cls.traits(part.config).uses_gpu else "cpu"
    context = RewardContext(
        device=device, gpus=float(device == "cuda"), seed=config.seed, threads=config.cluster.threads_per_actor
    )
    return LocalJudge(evaluating.section(part), part, context, config.trainer.startup_timeout_seconds)


def actor_judges(evaluating: Evaluating, config: Any, logs: Path, placement: Any) -> list[Judge]:
    """Create Ray actors for the judge and for the chooser, if there is one, placed one after the other."""
    from rlkit.config.plan import gpu_shares
    from rlkit.serving.pool import RewardPool

    parts = [part for part in (evaluating.judge, evaluating.chooser) if part is not None]
    workers = sum(part.config.workers for part in parts)
    judges: list[Judge] = []
    first = 0
    for part in parts:
        on_gpu = config.cluster.device == "cuda" and part.cls.traits(part.config).uses_gpu
        gpus = gpu_shares(config).rewards / workers if on_gpu else 0.0
        context = RewardContext(
            device=config.cluster.device if gpus else "cpu",
            gpus=gpus,
            seed=config.seed,
            threads=config.cluster.threads_per_actor,
        )
        name = "verifier" if part is evaluating.judge and evaluating.chooser else "reward"
        seconds, start = config.trainer.startup_timeout_seconds, first

        def place(number: int, start: int = start) -> Mapping[str, Any]:
            options: Mapping[str, Any] = placement.of("reward")(start + number)
            return options

        judges.append(RewardPool(evaluating.section(part), context, seconds, logs, name, place))
        first += part.config.workers
    return judges


async def start_all(judges: Sequence[Judge]) -> None:
    await asyncio.gather(*(judge.start() for judge in judges))
