"""Weight sync between learner and sampler, and the time-sharing of GPUs that both use.

GPUs alternate between learner and sampler: `publish` hands them to the sampler, `release_sampler` hands them back.
Where nothing is shared (on CPUs, on separate GPUs, with stale data), the phases cost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rlkit.cluster.waiting import WaitedTooLongError
from rlkit.config.plan import engines_sleep, sleep_level, weight_route
from rlkit.config.schema import RunConfig
from rlkit.rollout.pool import RolloutPool
from rlkit.serving.unasked import Rewards
from rlkit.weights.publication import Agreement, Canary, Published

if TYPE_CHECKING:
    from rlkit.learner.joint import JointLearner  # torch comes with it

T = TypeVar("T")
TELL_SECONDS = 5.0
"""When a transfer fails at the learner's end, how long to wait for a worker's error that would explain it."""


class WeightSync:
    def __init__(
        self, config: RunConfig, rollout: RolloutPool, learner: JointLearner, reward: Rewards, canary: Canary
    ) -> None:
        """`canary`: prompts whose log-probs prove that sampler and learner hold the same policy."""
        self.rollout, self.learner, self.reward, self.canary = rollout, learner, reward, canary
        self.route = weight_route(config.cluster, config.rollout, config.learner, config.model)
        self.sleeps, self.level = engines_sleep(config), sleep_level(config)
        self._wanted = np.empty(0)
        """The learner's log-probs of the canary at the last publication."""
        rollout.fetch = self._fetch

    async def release_sampler(self) -> None:
        """End sampling: engines free memory, and the learner takes the GPUs."""
        if self.sleeps:
            await self.rollout.sleep(self.level)
        await self.learner.reload()

    async def publish(self, version: int) -> dict[str, float]:
        """Send the weights to every rollout worker and verify them; return metrics: the weakest agreement with the
        learner, and the engines' times."""
        policy, bundle, proof = self.learner.policy, None, None
        if self.route == "object_store" or self.reward.follows_policy:
            bundle, proof = policy.publishable(self.canary)
        # First, so that a reward has the weights before it judges what they sample.
        following = asyncio.ensure_future(self.reward.follow(bundle))
        try:
            if proof is None:
                self._wanted = await policy.canary_logprobs(self.canary)
            else:
                if self.route == "object_store" and not self.sleeps:  # while the learner computes the canary
                    self.rollout.load(bundle, self.canary)
                _, self._wanted = await proof
            published = Published(bundle, version, self.canary, self._wanted)
            agreement, _ = await asyncio.gather(self._deliver(published), following)
        finally:
            following.cancel()
        return {**agreement.metrics(), **self.rollout.times()}

    async def with_learner_memory(self, work: Awaitable[T]) -> T:
        """Run something that needs the learner's memory while the engines hold theirs; then hand it back to them."""
        if self.sleeps:
            await self.rollout.sleep(1)
        await self.learner.reload()
        try:
            result = await work
        except WaitedTooLongError:
            raise  # do not wait again for what hangs
        except Exception:
            await self._give_back()  # sleeping engines would block an evaluation that comes next
            raise
        await self._give_back()
        return result

    async def _give_back(self) -> None:
        await self.learner.offload()
        if self.sleeps:
            await self.rollout.wake()

    async def _deliver(self, published: Published) -> Agreement:
        if self.route == "object_store" and not self.sleeps:  # each worker on its own, in one call
            self.rollout.announce(published)
            return (await asyncio.gather(self.rollout.confirm({}), self.learner.offload()))[0]
        ready, checksum = await self.rollout.prepare(published), None
        if self.route == "object_store":
            await self.rollout.give(ready)
        elif ready:
            checksum = await self._send(ready, published.version)
        await self.learner.offload()
        return await self.rollout.confirm(ready, checksum)

    async def _send(self, ready: dict[int, Any], version: int) -> str:
        """Return the learner's checksum. Raises WeightsNotLoadedError if a worker dies or fails meanwhile."""
        sending = asyncio.ensure_future(self.learner.policy.send_weights(list(ready.values()), version))
        arriving = asyncio.ensure_future(self.rollout.arrival(ready))
        try:
            await asyncio.wait((sending, arriving), return_when=asyncio.FIRST_EXCEPTION)
            if sending.done() and sending.exception() is not None:
                await asyncio.wait((arriving,), timeout=TELL_SECONDS)
            if arriving.done():
                arriving.result()
            return await sending
        finally:
            sending.cancel()
            arriving.cancel()

    async def _fetch(self) -> Published:
        """Return the learner's weights as a bundle, for a replaced worker. With stale data the learner may be a version
        ahead; that version is published next."""
        policy = self.learner.policy
        bundle, proof = policy.publishable(() if policy.offloaded else self.canary)
        version, wanted = await proof
        return Published(bundle, version, self.canary, wanted if wanted.size else self._wanted)
