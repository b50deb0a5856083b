"""Sources of answers: vLLM engines in Ray actors, started here for one model after another; a server; recorded
answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rlkit.assessment.config import Evaluating, Policy
from rlkit.assessment.endpoint import Endpoint
from rlkit.assessment.judges import Judge, actor_judges, local_judge, start_all
from rlkit.assessment.rows import Place
from rlkit.assessment.schema import EvaluateRun
from rlkit.cluster.waiting import blocking, waiting
from rlkit.config.compose import default_part
from rlkit.experience import Group
from rlkit.models.folder import model_folder
from rlkit.rollout.requests import GroupRequest
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker

ROOM_SECONDS = 60.0
CHUNK = 64
"""Recorded groups that are judged at a time."""


class Answers(Protocol):
    """A model that is ready to answer."""

    @property
    def lengths(self) -> Mapping[Place, int]:
        """Number of tokens of answers that come as texts."""

    @property
    def failures(self) -> Mapping[Place, str]:
        """Reasons for missing answers."""

    def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[list[Group]]: ...


@dataclass(frozen=True)
class Machinery:
    evaluating: Evaluating
    folder: RunFolder
    tracker: Tracker
    judges: Sequence[Judge]
    """The judge, and the chooser if there is one."""
    placement: Any = None

    @asynccontextmanager
    async def answers(self, policy: Policy) -> AsyncIterator[Answers]:
        config = self.evaluating.config
        if self.evaluating.kind == "endpoint":
            endpoint = Endpoint(config)
            try:
                await endpoint.start()
                yield endpoint
            finally:
                await endpoint.close()
            return
        from rlkit.rollout.pool import RolloutPool

        self.tracker.phase(f"loading {policy.path}")
        path = str(model_folder(policy.path))
        pool = RolloutPool(for_engines(self.evaluating), path, self.folder.logs, self.placement.of("rollout"))
        try:
            await pool.start()
            yield EngineAnswers(pool)
        finally:
            pool.close()


class EngineAnswers:
    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.lengths: Mapping[Place, int] = {}
        self.failures: Mapping[Place, str] = {}

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[list[Group]]:
        async for ref in self._pool.generate(requests):
            groups: list[Group] = await ref
            yield groups


async def recorded(groups: Sequence[Group]) -> AsyncIterator[list[Group]]:
    for start in range(0, len(groups), CHUNK):
        yield list(groups[start : start + CHUNK])


def for_engines(evaluating: Evaluating) -> EvaluateRun:
    """Return a run configuration for the actors, without a learner and weight transfers."""
    config = evaluating.config
    judges = [part for part in (evaluating.chooser, evaluating.judge) if part is not None]
    on_gpu = next((part for part in judges if part.cls.traits(part.config).uses_gpu), None)
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"sleep": "never", "workers": max(1, config.rollout.workers)}),
            "cluster": config.cluster.model_copy(update={"weight_transfer": "object_store", "placement": "colocated"}),
            "trainer": config.trainer.model_copy(update={"max_staleness": 0}),
            "model": config.model.model_copy(update={"lora": None}),
            "learner": config.learner.model_copy(update={"ranks": 1}),
            "reward": default_part("verifier") if on_gpu is None else evaluating.section(on_gpu),
        }
    )


@asynccontextmanager
async def machinery(
    evaluating: Evaluating, folder: RunFolder, tracker: Tracker, session: contextlib.ExitStack
) -> AsyncIterator[Machinery]:
    """Start the judges and, for engines, Ray (which `session` ends)."""
    config = evaluating.config
    limit = config.trainer.startup_timeout_seconds, "trainer.startup_timeout_seconds"
    placement: Any = None
    if evaluating.kind != "engine":
        judges = [local_judge(evaluating, evaluating.judge)]
        if evaluating.chooser is not None:
            judges.append(local_judge(evaluating, evaluating.chooser))
    else:
        from rlkit.cluster.placement import Placement, plan_bundles, released, reserve
        from rlkit.cluster.ray_session import ray_session

        tracker.phase("starting Ray")
        with blocking("the start", "Ray", *limit):
            session.enter_context(ray_session(config.cluster, folder.logs / "ray", _store_bytes(config)))
        own = for_engines(evaluating)
        workers = sum(part.config.workers for part in (evaluating.judge, evaluating.chooser) if part is not None)
        bundles = plan_bundles(own, critic_ranks=0, reward_workers=workers)
        placement = Placement(session.enter_context(released(await reserve(own, bundles, ROOM_SECONDS))), bundles)
        judges = actor_judges(evaluating, own, folder.logs, placement)
        if not judges:
            judges = [local_judge(evaluating, None)]
    try:
        if evaluating.judge is not None:
            tracker.phase("loading the judge")
        async with waiting("the start", "the judges", *limit):
            await start_all(judges)
        yield Machinery(evaluating, folder, tracker, judges, placement)
    finally:
        await asyncio.gather(*(judge.close() for judge in judges))


def _store_bytes(config: EvaluateRun) -> float:
    """Size of the object store for groups that wait to be judged."""
    if config.cluster.object_store_gib is not None:
        return config.cluster.object_store_gib * 2**30
    rollout = config.rollout
    waiting_tokens = 4 * rollout.max_concurrent_samples * (rollout.max_prompt_tokens + rollout.max_response_tokens)
    return max(2.0**29, min(2.0**32, 16.0 * waiting_tokens))
