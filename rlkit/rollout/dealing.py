"""Which worker samples what, and how much each has to do."""

from __future__ import annotations

import asyncio
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
    counts, tokens = list(unfinished), [0] * len(unfinished)
    shares: list[list[int]] = [[] for _ in unfinished]
    for index in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt.token_ids)):
        chosen = min(range(len(counts)), key=lambda w: (counts[w], tokens[w]))
        counts[chosen] += requests[index].responses
        tokens[chosen] += len(requests[index].prompt.token_ids)
        shares[chosen].append(index)
    return [[requests[index] for index in sorted(share)] for share in shares]
