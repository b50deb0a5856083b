"""Training on recorded responses: what takes the places of sampler and weight sync, and measures held-out ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from typing import TypeVar

from algorithms.base import Algorithm
from rlkit.evaluation import Evaluation
from rlkit.experience import Group, Prompt
from rlkit.experience.types import recorded_group
from rlkit.learner.joint import JointLearner
from rlkit.rollout.requests import GroupRequest

T = TypeVar("T")


def recorded_groups(prompts: Iterable[Prompt]) -> Iterator[Group]:
    return (recorded_group(prompt, f"recorded-{i}", 1) for i, prompt in enumerate(prompts))


class RecordedResponses:
    """In place of a rollout pool."""

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[list[Group]]:
        yield [recorded_group(request.prompt, request.id, request.step) for request in requests]


class NoSync:
    """In place of WeightSync: no engine has the policy's weights."""

    async def publish(self, version: int) -> None: ...

    async def release_sampler(self) -> None: ...

    async def with_learner_memory(self, work: Awaitable[T]) -> T:
        return await work


class RecordedEvaluator:
    """Held-out recorded responses under the policy: how likely they are, or what else the algorithm measures."""

    def __init__(self, prompts: Sequence[Prompt], learner: JointLearner, algorithm: Algorithm) -> None:
        self.groups = list(recorded_groups(prompts))
        self.learner, self.algorithm = learner, algorithm

    async def evaluate(self, step: int) -> Evaluation:
        metrics = self.algorithm.heldout(await self.learner.heldout(self.groups, step))
        return Evaluation(next(iter(metrics)), metrics)

    async def judge_training(self, groups: list[Group]) -> None:
        """Nothing was sampled that a verifier could judge."""
