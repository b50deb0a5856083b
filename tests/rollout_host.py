"""A rollout worker whose sampler can be asked directly: for the tests of rollout."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rlkit.rollout.sampler import Request, Response
from rlkit.rollout.worker import RolloutWorker


class OpenWorker(RolloutWorker):
    """Use through Ray."""

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

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
