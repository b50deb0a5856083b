"""Which worker samples what, and how much each has to do."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from rlkit.rollout.requests import GroupRequest


@dataclass(eq=False)
class Load:
    """What one worker's process was given, in responses."""

    dealt: int = 0
    handed_over: int = 0
    """Of the groups that have come back."""
    finished: int = 0
    """As the worker last said: also those of groups that are not whole yet."""
    asking: asyncio.Task[None] | None = None
    """Asks the worker for that number."""

    @property
    def unfinished(self) -> int:
        """At most."""
        return self.dealt - max(self.handed_over, self.finished)

    def again(self) -> Load:
        """Of a new process, which samples whatever has not come back."""
        return Load(self.dealt - self.handed_over)


def responses(requests: Sequence[GroupRequest]) -> int:
    return sum(request.responses for request in requests)


def deal(requests: Sequence[GroupRequest], unfinished: Sequence[int]) -> list[list[GroupRequest]]:
    """Split requests over workers that have so many unfinished responses each: then equal numbers of responses where
    that can be (within a group), and similar numbers of prompt tokens.

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
