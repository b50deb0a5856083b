"""Training on recorded responses: what replaces sampler and weight sync, and evaluates held-out responses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from algorithms.base import Algorithm
from rlkit.evaluation import Evaluation, Evaluator
from rlkit.experience import Group, Prompt
from rlkit.experience.types import recorded_group
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.stored import Stored

if TYPE_CHECKING:
    from rlkit.learner.joint import JointLearner  # torch comes with it

T = TypeVar("T")
Publish = Callable[[int], Awaitable[object]]
"""Sends the policy's weights to the engines, as the version given."""


def recorded_groups(prompts: Iterable[Prompt]) -> Iterator[Group]:
    return (recorded_group(prompt, f"recorded-{i}", 1) for i, prompt in enumerate(prompts))


class RecordedResponses:
    """Replaces a rollout pool."""

    async def places(self, responses: int) -> int:
        raise NotImplementedError("nothing is sampled, so there are no slots to wait for")

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[list[Group]]:
        yield [recorded_group(request.prompt, request.id, request.step) for request in requests]


class NoSync:
    """Replaces WeightSync: no engine samples training data with the policy's weights."""

    async def publish(self, version: int) -> dict[str, float]:
        return {}

    async def release_sampler(self) -> None: ...

    async def with_learner_memory(self, work: Awaitable[T]) -> T:
        return await work


class RecordedEvaluator:
    """Evaluates held-out recorded responses: their likelihood under the policy, or whatever the algorithm measures; and
    sampled ones, if requested (`evaluation.generate`)."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        learner: JointLearner,
        algorithm: Algorithm,
        sampled: tuple[Evaluator, Publish] | None = None,
    ) -> None:
        self.groups = list(recorded_groups(prompts))
        self.learner, self.algorithm, self.sampled = learner, algorithm, sampled

    async def evaluate(self, step: int) -> Evaluation:
        metrics: Mapping[str, float] = {}
        if self.groups:
            metrics = self.algorithm.heldout(await self.learner.heldout(self.groups, step))
        if self.sampled is None:
            return Evaluation(next(iter(metrics)), metrics)
        evaluator, publish = self.sampled
        await publish(step)  # nothing else samples, so the engines need the weights only here
        sampled = await evaluator.evaluate(step)
        return Evaluation(sampled.headline, {**sampled.metrics, **metrics})

    async def judge_training(self, groups: list[Group], stored: Stored) -> list[Group] | None:
        return None if self.sampled is None else await self.sampled[0].judge_training(groups, stored)
