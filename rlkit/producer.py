"""Keeps the buffer filled: room, prompts, samples, scores, buffer. The only source of training groups."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from rlkit.cluster.waiting import waiting
from rlkit.data.order import MixtureOrder, PromptOrder
from rlkit.experience import Prompt
from rlkit.experience.buffer import with_surplus
from rlkit.experience.scores import ScoreReport
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.unasked import Rewards

T = TypeVar("T")


class Sampler(Protocol):
    def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
        """Yield lists of groups, or references to such, as they finish."""


class Producer:
    """Runs beside the trainer until cancelled. Only references to groups pass through it."""

    def __init__(
        self,
        order: PromptOrder | MixtureOrder,
        rollout: Sampler,
        reward: Rewards,
        buffer: Any,
        *,
        groups_per_step: int,
        oversample: float,
        samples_per_prompt: int,
        greedy: bool,
        seed: int,
        step_timeout_seconds: float,
    ) -> None:
        self.order, self.rollout, self.reward, self.buffer = order, rollout, reward, buffer
        self.groups_per_step, self.samples_per_prompt = groups_per_step, samples_per_prompt
        self.most_at_once = with_surplus(groups_per_step, oversample)
        self.greedy, self.seed, self.step_timeout_seconds = greedy, seed, step_timeout_seconds
        self.started = 0
        self._open: dict[str, GroupRequest] = {}
        """Requested and not yet in the buffer."""
        self._again: deque[GroupRequest] = deque()
        """Requested before the checkpoint that this run resumes: requested again with their ids and seeds."""
        self._report = ScoreReport()
        self._generated_at: float | None = None
        self._generating = 0.0

    async def run(self) -> None:
        """Fill the buffer until cancelled. Raises what rollout, reward or buffer raise."""
        async with asyncio.TaskGroup() as scoring:
            while True:
                async with self._waiting("room in the buffer, for the next step or in place of rejected groups", 3):
                    room = await self.buffer.reserve.remote(len(self._again) or self.most_at_once)
                requests = self._requests(room)
                began = time.monotonic()
                async for groups in self.rollout.generate(requests):
                    scoring.create_task(self._score(groups))
                self._generated_at = time.monotonic()
                self._generating += self._generated_at - began

    async def _score(self, groups: Any) -> None:
        scored = await self.reward.score([groups])
        self._report += scored.report
        async with self._waiting("the buffer to take scored groups", 1):
            added = await self.buffer.add.remote(scored.batches[0])
        for group_id in added:
            del self._open[group_id]

    def _waiting(self, what: str, times: int) -> AbstractAsyncContextManager[None]:
        """`times`: a step, the evaluation and the checkpoint after it may each take a step's time."""
        limit = "trainer.step_timeout_seconds" if times == 1 else f"{times} x trainer.step_timeout_seconds"
        what = f"{what} ({self.started} groups asked for, {len(self._open)} of them not in the buffer)"
        return waiting("the producer", what, times * self.step_timeout_seconds, limit)

    def _requests(self, count: int) -> list[GroupRequest]:
        again = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        new = [self._request(self.started + i, p) for i, p in enumerate(self.order.take(count - len(again)))]
        self.started += len(new)
        requests = [*again, *new]
        self._open.update((request.id, request) for request in requests)
        return requests

    def _request(self, number: int, prompt: Prompt) -> GroupRequest:
        return GroupRequest(
            id=f"{number:08d}",
            prompt=prompt,
            samples=self.samples_per_prompt,
            seed=self.seed,
            step=number // self.groups_per_step + 1,
            greedy=self.greedy,
        )

    def ask_again(self, groups: Sequence[tuple[str, str]]) -> None:
        """Put groups ((group, prompt) ids) that will not be trained back among the open ones: for a checkpoint in
        mid-step."""
        prompts = self.order.by_id()
        self._again.extend(self._request(int(group), prompts[prompt]) for group, prompt in groups)

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, and the open groups."""
        open_groups = [{"id": r.id, "prompt": r.prompt.id} for r in (*self._open.values(), *self._again)]
        return {"order": self.order.state_dict(), "started": self.started, "open": open_groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError if the data have changed."""
        self.order.load_state_dict(state["order"])
        self.started = int(state["started"])
        prompts = self.order.by_id()
        self._again = deque(self._request(int(entry["id"]), prompts[entry["prompt"]]) for entry in state["open"])

    def take_report(self) -> tuple[ScoreReport, float]:
        """What the reward did, and the sampler's working seconds, since the last call."""
        report, self._report = self._report, ScoreReport()
        seconds, self._generating = self._generating, 0.0
        return report, seconds

    def generation_end(self) -> float | None:
        """`time.monotonic()` when the last group of the latest batch left the sampler."""
        return self._generated_at


async def until(work: Awaitable[T], *background: asyncio.Task[None]) -> T:
    """Await `work`; if a background task fails first, raise its error, out of its exception group."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, *background}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        task.cancel()
    error = next(task.exception() for task in background if task.done())
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise error or RuntimeError("a background task ended although it should not")
