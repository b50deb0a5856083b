"""The buffer that producer and trainer share on the driver's event loop; a call that comes too early waits."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.experience.buffer import BufferStats, ExperienceBuffer
from rlkit.experience.filters import BufferConfig, make_filter, masked
from rlkit.experience.types import Group


class WaitingBuffer:
    """`reserve` and `take` wait on a condition until they can answer."""

    def __init__(
        self,
        groups_per_step: int,
        max_staleness: int,
        config: BufferConfig,
        oversample: float = 1.0,
        last_step: int = sys.maxsize,
    ) -> None:
        self.buffer = ExperienceBuffer(
            groups_per_step, max_staleness, make_filter(config), config.max_rejected_share, oversample, last_step
        )
        self.masks_truncated = config.truncated == "mask"
        self.changed = asyncio.Condition()
        self.ended = False

    @property
    def max_staleness(self) -> int:
        return self.buffer.max_staleness

    async def reserve(self, limit: int) -> list[int]:
        """Wait for and return at least one and at most `limit` slots for groups, given by their steps.

        Synchronous training samples in rounds: replacements for rejected groups are granted only when the whole round
        is judged, so that runs repeat to the last bit.
        """
        async with self.changed:
            while self._mid_round() or not (places := self.buffer.reserve(limit)):
                await self.changed.wait()
            return places

    def _mid_round(self) -> bool:
        return self.max_staleness == 0 and self.buffer.stats().in_flight > 0

    async def add(self, groups: Sequence[Group]) -> None:
        """Hand in scored groups."""
        async with self.changed:
            for group in groups:
                self.buffer.add(masked(group) if self.masks_truncated else group)
            self.changed.notify_all()

    async def take(self) -> list[Group]:
        """Wait for and return the groups of the next step. Raises TooManyRejectedError."""
        async with self.changed:
            while self.ended or (groups := self.buffer.take()) is None:
                await self.changed.wait()
            return groups

    async def advance(self, version: int) -> None:
        async with self.changed:
            self.buffer.advance(version)
            self.changed.notify_all()

    def take_rejected(self) -> list[Group]:
        return self.buffer.take_rejected()

    def put_back(self) -> list[tuple[str, str]]:
        """Undo the step that has begun, for good: a `take` that still waits gets nothing any more."""
        self.ended = True
        return self.buffer.put_back()

    def stats(self) -> BufferStats:
        return self.buffer.stats()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state_dict(state)
