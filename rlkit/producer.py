"""Keeps the buffer filled: reserves slots, takes prompts, samples, scores, adds. The only source of training groups."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from rlkit.cluster.waiting import waiting
from rlkit.data.order import MixtureOrder, PromptOrder
from rlkit.experience import Prompt
from rlkit.experience.scores import ScoreReport, with_scores
from rlkit.experience.waiting_buffer import WaitingBuffer
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.stored import Stored, groups_in
from rlkit.serving.unasked import Rewards

T = TypeVar("T")


class Sampler(Protocol):
    async def places(self, responses: int) -> int:
        """Return how many more groups of `responses` responses fill the engines; wait until there is room for one."""

    def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
        """Yield lists of groups, or references to them, as they finish. `places` counts them from the call on."""


class Producer:
    """Runs alongside the trainer until cancelled."""

    def __init__(
        self,
        order: PromptOrder | MixtureOrder,
        rollout: Sampler,
        reward: Rewards,
        buffer: WaitingBuffer,
        *,
        most_at_once: int,
        waits_for_places: bool,
        samples_per_prompt: int,
        greedy: bool,
        seed: int,
        step_timeout_seconds: float,
    ) -> None:
        """`most_at_once`: groups to request together. `waits_for_places`: groups start when an engine has room for
        them, so that they begin with the newest weights; otherwise as soon as the buffer has room."""
        self.order, self.rollout, self.reward, self.buffer = order, rollout, reward, buffer
        self.most_at_once, self.waits_for_places = most_at_once, waits_for_places
        self.samples_per_prompt = samples_per_prompt
        self.greedy, self.seed, self.step_timeout_seconds = greedy, seed, step_timeout_seconds
        self.stored = Stored()
        """The tokens of the groups that are open, in the buffer, or being trained on."""
        self.started = 0
        self._open: dict[str, GroupRequest] = {}
        """Groups requested and not yet in the buffer."""
        self._again: list[GroupRequest] = []
        """Groups open at the checkpoint that this run resumes, to be requested again with the same ids and seeds."""
        self._report = ScoreReport()
        self._sampled_at: dict[int, float] = {}
        """Step -> `time.monotonic()` when its latest group so far left the sampler."""
        self._generating = 0.0
        self._streams = 0
        """Number of open calls of the sampler."""
        self._began = 0.0
        """Time from which their seconds are not yet counted in `_generating`."""

    async def run(self) -> None:
        """Fill the buffer until cancelled. Raises what rollout, reward or buffer raise."""
        async with asyncio.TaskGroup() as working:
            while True:
                most = len(self._again) or self.most_at_once
                if self.waits_for_places:
                    async with self._waiting("an engine with room for another group"):
                        most = min(most, await self.rollout.places(self.samples_per_prompt + self.greedy))
                steps = await self.buffer.reserve(most)  # waits for the trainer, whose steps have a time limit
                stream = self.rollout.generate(self._requests(steps))  # called here, so that `places` counts them
                working.create_task(self._sample(stream, working))

    async def _sample(self, stream: AsyncIterator[Any], working: asyncio.TaskGroup) -> None:
        if not self._streams:
            self._began = time.monotonic()
        self._streams += 1
        async for groups in stream:
            working.create_task(self._score(groups, time.monotonic()))
        self._streams -= 1
        if not self._streams:
            self._generating += time.monotonic() - self._began

    async def _score(self, sampled: Any, left: float) -> None:
        """Score what the sampler yielded at time `left`, and add it to the buffer."""
        groups, scored = await asyncio.gather(groups_in(sampled), self.reward.score([sampled]))
        self._report += scored.report
        self.stored.add(groups, sampled)
        for group in groups:
            self._sampled_at[group.step] = max(left, self._sampled_at.get(group.step, left))
        await self.buffer.add(with_scores(groups, scored.scores))
        for group in groups:
            del self._open[group.id]

    def _waiting(self, what: str) -> AbstractAsyncContextManager[None]:
        """A step, its evaluation and its checkpoint may each take a step's time limit."""
        what = f"{what} ({self.started} groups requested, {len(self._open)} of them not yet in the buffer)"
        return waiting("the producer", what, 3 * self.step_timeout_seconds, "3 x trainer.step_timeout_seconds")

    def _requests(self, steps: Sequence[int]) -> list[GroupRequest]:
        """Return one request for each slot."""
        again = []
        for step in steps:
            # Of an earlier step if rollout.oversample is now smaller. Checkpoints before 0.5 name no step.
            repeated = next((request for request in self._again if request.step <= step), None)
            if repeated is not None:
                self._again.remove(repeated)
                again.append(self._request(int(repeated.id), repeated.prompt, step))
        lacking = list((Counter(steps) - Counter(request.step for request in again)).elements())
        prompts = zip(lacking, self.order.take(len(lacking)), strict=True)
        new = [self._request(self.started + i, prompt, step) for i, (step, prompt) in enumerate(prompts)]
        self.started += len(new)
        requests = [*again, *new]
        self._open.update((request.id, request) for request in requests)
        return requests

    def _request(self, number: int, prompt: Prompt, step: int) -> GroupRequest:
        return GroupRequest(
            id=f"{number:08d}",
            prompt=prompt,
            samples=self.samples_per_prompt,
            seed=self.seed,
            step=step,
            oldest=max(0, step - 1 - self.buffer.max_staleness),
            greedy=self.greedy,
        )

    def weights_came(self, asked: float) -> None:
        """Start the clock for requests made since `asked` (`time.monotonic()`), which waited for the weights."""
        if self._began >= asked:
            self._began = time.monotonic()

    def ask_again(self, groups: Sequence[tuple[str, str]], step: int) -> None:
        """Put groups ((group, prompt) ids) of a step that will not be trained back among the open ones, for a
        checkpoint in mid-step."""
        prompts = self.order.named({prompt for _, prompt in groups})
        self._again.extend(self._request(int(group), prompts[prompt], step) for group, prompt in groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, and the open groups."""
        requests = (*self._open.values(), *self._again)
        open_groups = [{"id": r.id, "prompt": r.prompt.id, "step": r.step} for r in requests]
        return {"order": self.order.state_dict(), "started": self.started, "open": open_groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raises DataError if the data have changed."""
        self.order.load_state_dict(state["order"])
        self.started = int(state["started"])
        prompts = self.order.named({entry["prompt"] for entry in state["open"]})
        steps = [entry.get("step", 0) for entry in state["open"]]
        last = min(steps, default=0) + self.buffer.max_staleness  # max_staleness may be smaller than before
        self._again = [
            self._request(int(entry["id"]), prompts[entry["prompt"]], min(step, last))
            for entry, step in zip(state["open"], steps, strict=True)
        ]

    def take_report(self) -> tuple[ScoreReport, float]:
        """Return the reward's report and the sampler's working seconds since the last call."""
        report, self._report = self._report, ScoreReport()
        if self._streams:
            now = time.monotonic()
            self._generating += now - self._began
            self._began = now
        seconds, self._generating = self._generating, 0.0
        return report, seconds

    def sampled_at(self, step: int) -> float | None:
        """Return `time.monotonic()` when the last group of the step now being trained left the sampler."""
        now = self._sampled_at.get(step)
        self._sampled_at = {later: when for later, when in self._sampled_at.items() if later > step}
        return now


async def until(work: Awaitable[T], *background: asyncio.Task[None]) -> T:
    """Await `work`; if a background task fails first, raise its error, unwrapped from its exception group."""
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
    raise error or RuntimeError("a background task ended unexpectedly")
