"""Keeps the buffer filled: room, prompts, samples, scores, buffer. The only source of training groups."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rlkit.data.order import PromptOrder
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.worker import GroupRequest
from rlkit.serving.pool import RewardPool
from rlkit.serving.results import ScoreReport


class Producer:
    """Runs beside the trainer until cancelled. Only references to groups pass through it."""

    def __init__(
        self,
        order: PromptOrder,
        rollout: RolloutPool,
        reward: RewardPool,
        buffer: Any,
        *,
        groups_per_step: int,
        samples_per_prompt: int,
        greedy: bool,
        seed: int,
    ) -> None:
        self.order, self.rollout, self.reward, self.buffer = order, rollout, reward, buffer
        self.groups_per_step, self.samples_per_prompt = groups_per_step, samples_per_prompt
        self.greedy, self.seed = greedy, seed
        self.started = 0
        self._report = ScoreReport()
        self._generated_at: float | None = None
        self._generating = 0.0

    async def run(self) -> None:
        """Fill the buffer for ever. Raises what rollout, reward or buffer raise."""
        async with asyncio.TaskGroup() as scoring:
            while True:
                room = await self.buffer.reserve.remote(self.groups_per_step)
                requests = [self._request(prompt) for prompt in self.order.take(room)]
                began = time.monotonic()
                async for groups in self.rollout.generate(requests):
                    scoring.create_task(self._score(groups))
                self._generated_at = time.monotonic()
                self._generating += self._generated_at - began

    async def _score(self, groups: Any) -> None:
        scored = await self.reward.score([groups])
        self._report += scored.report
        await self.buffer.add.remote(scored.batches[0])

    def _request(self, prompt: Any) -> GroupRequest:
        number = self.started
        self.started += 1
        return GroupRequest(
            id=f"{number:08d}",
            prompt=prompt,
            samples=self.samples_per_prompt,
            seed=self.seed,
            step=number // self.groups_per_step + 1,
            greedy=self.greedy,
        )

    def take_report(self) -> tuple[ScoreReport, float]:
        """What the reward did, and for how many seconds the sampler worked, since the last call."""
        report, self._report = self._report, ScoreReport()
        seconds, self._generating = self._generating, 0.0
        return report, seconds

    def generation_end(self) -> float | None:
        """`time.monotonic()` when the last group of the latest batch left the sampler."""
        return self._generated_at


async def until(work: Any, background: asyncio.Task[None]) -> Any:
    """The result of `work`, unless the background task fails first: then its error, out of its exception group."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, background}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        task.cancel()
    error = background.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise error or RuntimeError("the producer ended although it should not")
