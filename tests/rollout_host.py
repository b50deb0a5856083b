"""A rollout worker whose sampler can be asked directly, and weights for a whole pool: for the tests of rollout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rlkit.learner.actors import LearnerWorker
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.sampler import Request, Response
from rlkit.rollout.worker import RolloutWorker
from rlkit.weights.publication import Published


async def publish_bundle(pool: RolloutPool, published: Published) -> float:
    """As a run does whose weights go through the object store."""
    ready = await pool.prepare(published)
    await pool.give(ready)
    return await pool.confirm(ready)


def damage_next_broadcast() -> None:
    """One bit flips on the way of the next bucket that this process sends to all, or receives, over gloo."""
    from rlkit.weights import gloo

    real = gloo.broadcast

    def damaging(group: Any, buffer: Any) -> None:
        gloo.broadcast = real
        buffer[len(buffer) // 2] ^= 1  # what is sent
        real(group, buffer)
        buffer[len(buffer) // 2] ^= 1  # what was received

    gloo.broadcast = damaging


class OpenWorker(RolloutWorker):
    """Use through Ray."""

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    broken: str | None = None

    async def break_transfer(self, step: str | None) -> None:
        """The engine fails at this step from now on, before it has done anything."""
        self.broken = step

    async def damage_next(self) -> None:
        """One bit of the next transfer arrives as another."""
        damage_next_broadcast()

    def _transfer(self, step: str, arguments: dict[str, Any], version: int) -> None:
        if step == self.broken:
            raise MemoryError(f"no room for {step}")
        super()._transfer(step, arguments, version)

    async def sample(self, requests: Sequence[Request]) -> list[Response]:
        """Responses in the order of the requests."""
        return await self._in_thread(lambda: self._sample(requests))

    def _sample(self, requests: Sequence[Request]) -> list[Response]:
        found: dict[str, Response] = {}
        for request in requests:
            self.sampler.add(request)
        while self.sampler.busy:
            found |= {response.id: response for response in self.sampler.step()}
        return [found[request.id] for request in requests]


class OpenRank(LearnerWorker):
    """Use through Ray, in place of LearnerWorker."""

    def damage_next(self) -> None:
        """One bit of the next transfer is sent as another, to all workers."""
        damage_next_broadcast()
