"""Decides which worker samples what, and tracks how much each has to do."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rlkit.rollout.requests import GroupRequest


@dataclass(eq=False)
class Load:
    """The load of one worker's process, in responses."""

    dealt: int = 0
    handed_over: int = 0
    """Responses of groups that have come back."""
    finished: int = 0
    """As last reported by the worker, including responses of incomplete groups."""
    asking: asyncio.Task[None] | None = None
    """Task that asks the worker for `finished`."""

    @property
    def unfinished(self) -> int:
        """Upper bound of the responses not yet finished."""
        return self.dealt - max(self.handed_over, self.finished)

    def again(self) -> Load:
        """Return the load of a new process, which samples whatever has not come back."""
        return Load(self.dealt - self.handed_over)


HasFinished = Callable[[int, int], Awaitable[int | None]]
"""(worker, n): how many responses its process has finished, once they are at least n; None if it died."""


class Loads:
    """The loads of all workers; callers can wait until a worker has a free slot."""

    def __init__(self, workers: int, places: int, has_finished: HasFinished) -> None:
        """`places`: number of responses that an engine samples at once."""
        self._loads = [Load() for _ in range(workers)]
        self._most, self._has_finished = places, has_finished
        self._less_to_do = asyncio.Condition()

    def __getitem__(self, worker: int) -> Load:
        return self._loads[worker]

    def deal(self, requests: Sequence[GroupRequest]) -> list[list[GroupRequest]]:
        """Assign requests to workers; return a share for each worker."""
        shares = deal(requests, [load.unfinished for load in self._loads])
        for load, share in zip(self._loads, shares, strict=True):
            load.dealt += responses(share)
        return shares

    async def again(self, worker: int) -> None:
        """Note that a new process samples whatever has not come back."""
        self._loads[worker] = self._loads[worker].again()
        await self.tell()

    async def free(self, size: int) -> int:
        """Return how many more groups of `size` responses fill the engines; wait until one has a free slot.

        There may be slots for only some responses of the last group: the others wait in the engine's queue.
        """
        async with self._less_to_do:
            while not (free := [self._most - o.unfinished for o in self._loads if o.unfinished < self._most]):
                for worker, load in enumerate(self._loads):
                    if load.asking is None:
                        load.asking = asyncio.create_task(self._ask(worker, load))
                await self._less_to_do.wait()
        return sum(-(-places // size) for places in free)

    async def _ask(self, worker: int, load: Load) -> None:
        """Wait until an engine has finished enough responses to free a slot, even if no group is complete."""
        finished = await self._has_finished(worker, load.dealt - self._most + 1)
        if finished is None:  # its replacement will be asked
            return
        load.finished, load.asking = finished, None
        await self.tell()

    async def tell(self) -> None:
        """Wake those that wait for a free slot."""
        async with self._less_to_do:
            self._less_to_do.notify_all()


def responses(requests: Sequence[GroupRequest]) -> int:
    return sum(request.responses for request in requests)


def deal(requests: Sequence[GroupRequest], unfinished: Sequence[int]) -> list[list[GroupRequest]]:
    """Split requests over workers with these numbers of unfinished responses, so that each then has as many responses
    as the others where possible (within a group), and a similar number of prompt tokens.

    Longest prompts first, each to the worker with the fewest responses, then the fewest tokens; shares keep the order.
    """
    shares: list[list[int]] = [[] for _ in unfinished]
    least = [(count, 0, worker) for worker, count in enumerate(unfinished)]
    heapq.heapify(least)
    for index in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt.token_ids)):
        count, tokens, worker = least[0]
        shares[worker].append(index)
        request = requests[index]
        heapq.heapreplace(least, (count + request.responses, tokens + len(request.prompt.token_ids), worker))
    return [[requests[index] for index in sorted(share)] for share in shares]
