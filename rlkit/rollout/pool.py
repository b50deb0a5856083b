"""All rollout workers: groups out, weights in, each worker's version confirmed, the dead replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.cluster.placement import Place, anywhere
from rlkit.config.schema import RunConfig
from rlkit.config.shares import gpu_shares
from rlkit.rollout.health import Health, State
from rlkit.rollout.sampler import engine_environment
from rlkit.rollout.worker import GroupRequest, RolloutWorker

log = logging.getLogger(__name__)

CANARY_TOLERANCE_FP32 = 1e-3
CANARY_TOLERANCE_HALF = 0.15


class WeightsNotLoadedError(RuntimeError):
    """A worker samples with other weights than it was given."""


class RolloutFailedError(RuntimeError):
    """Rollout workers die more often than `rollout.max_restarts` allows; the message has the last cause."""


@dataclass(frozen=True)
class Published:
    """The weights that every worker must hold now."""

    bundle: Any
    """Reference to a WeightBundle."""
    version: int
    canary: tuple[int, ...]
    wanted: np.ndarray
    """[len(canary) - 1] the learner's log-probs of the canary."""


def deal(requests: Sequence[GroupRequest], workers: int) -> list[list[GroupRequest]]:
    """A share for each worker: equally many groups (one more or less), and about as many prompt tokens.

    The longest prompts are dealt out first, each to the worker with the fewest tokens among those with the fewest
    groups; every share is in the order asked for. (How long responses will be, nobody knows.)
    """
    groups, tokens = [0] * workers, [0] * workers
    shares: list[list[int]] = [[] for _ in range(workers)]
    for place in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt.token_ids)):
        chosen = min(range(workers), key=lambda w: (groups[w], tokens[w]))
        groups[chosen] += 1
        tokens[chosen] += len(requests[place].prompt.token_ids)
        shares[chosen].append(place)
    return [[requests[place] for place in sorted(share)] for share in shares]


class RolloutPool:
    """Used from the driver's asyncio loop."""

    def __init__(self, config: RunConfig, model_path: str, logs: Path, place: Place = anywhere) -> None:
        """`place(i)` says where Ray should put worker i, and those that replace it."""
        self.config, self.model_path, self.logs, self._place = config, model_path, logs, place
        self.workers = [self._make(i) for i in range(config.rollout.workers)]
        self.health = [Health(config.rollout.max_restarts) for _ in self.workers]
        self._repairs = [asyncio.Lock() for _ in self.workers]
        self._published: Published | None = None

    def _make(self, index: int) -> Any:
        import ray

        config = self.config
        device, gpus = config.cluster.device, gpu_shares(config).engine
        environment = engine_environment(device, config.cluster.threads_per_actor)
        kind = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0, max_concurrency=1000)(RolloutWorker)
        return kind.options(runtime_env={"env_vars": environment}, **self._place(index)).remote(
            self.model_path, config.model, config.rollout, device, config.seed, str(self.logs / f"rollout-{index}.log")
        )

    async def start(self) -> None:
        """Load all engines."""
        await asyncio.gather(*(worker.start.remote() for worker in self.workers))

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
        """References to lists of finished groups, as they finish, from all workers.

        What a worker had not handed over when it died is sampled again, with the same seeds, by the one that replaces
        it. Raises RolloutFailedError when workers die too often.
        """
        finished: asyncio.Queue[Any] = asyncio.Queue()
        shares = deal(requests, len(self.workers))

        async def relay(index: int, share: Sequence[GroupRequest]) -> None:
            try:
                await self._sample(index, share, finished)
            except BaseException as error:
                finished.put_nowait(error)
                raise
            finished.put_nowait(None)

        tasks = [asyncio.create_task(relay(i, share)) for i, share in enumerate(shares) if share]
        try:
            open_streams = len(tasks)
            while open_streams:
                item = await finished.get()
                if item is None:
                    open_streams -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, index: int, share: Sequence[GroupRequest], finished: asyncio.Queue[Any]) -> None:
        """Put references to this share's groups into `finished`, on this worker and, if it dies, its successors."""
        from ray.exceptions import RayActorError

        left = {request.id: request for request in share}
        while left:
            worker = self.workers[index]
            try:
                groups: Any = None
                async for ref in worker.generate.options(num_returns="streaming").remote(list(left.values())):
                    if groups is None:
                        groups = ref
                        continue
                    for group_id in await ref:
                        del left[group_id]
                    finished.put_nowait(groups)
                    groups = None
                if groups is not None:
                    await groups  # not groups, then, but the error that ended the stream
            except RayActorError as error:
                await self._replace(index, worker, error)

    async def load_weights(self, bundle: Any, version: int, canary: Sequence[int], wanted: np.ndarray) -> float:
        """Publish weights to every worker; returns the largest canary difference.

        Raises WeightsNotLoadedError unless each worker confirms the version and samples as the learner does: `wanted`
        [len(canary) - 1] are the learner's log-probs.
        """
        self._published = published = Published(bundle, version, tuple(canary), wanted)
        return max(await asyncio.gather(*(self._load(i, published) for i in range(len(self.workers)))))

    async def _load(self, index: int, published: Published) -> float:
        from ray.exceptions import RayActorError

        worker = self.workers[index]
        try:
            return await self._confirmed(index, worker, published)
        except RayActorError as error:
            await self._replace(index, worker, error)
        if not self.health[index].may_sample(published.version):  # it was replaced while these weights were published
            return await self._confirmed(index, self.workers[index], published)
        return 0.0

    async def _confirmed(self, index: int, worker: Any, published: Published) -> float:
        """Let a worker load weights; its canary difference, if it is small enough."""
        receipt = await worker.load_weights.remote(published.bundle, list(published.canary))
        if receipt.version != published.version:
            raise WeightsNotLoadedError(
                f"rollout worker {index} has weights of version {receipt.version}, not {published.version}"
            )
        difference = float(np.abs(receipt.canary_logprobs - published.wanted).max())
        if not difference <= self.tolerance:  # also true for NaN
            raise WeightsNotLoadedError(
                f"rollout worker {index}: after version {published.version} was loaded, its log-probs of the canary "
                f"prompt differ from the learner's by {difference:.3g}, more than {self.tolerance:g} "
                "(rollout.canary_tolerance): it does not sample from the policy that is trained"
            )
        self.health[index] = self.health[index].confirmed(published.version)
        return difference

    async def _replace(self, index: int, dead: Any, cause: Exception) -> None:
        """Start a new process in a dead worker's place and give it the present weights.

        Whoever notices the death calls this; only the first does the work. Raises RolloutFailedError after
        `rollout.max_restarts` replacements, or if the new one is not ready in time.
        """
        import ray
        from ray.exceptions import RayActorError

        async with self._repairs[index]:
            if self.workers[index] is not dead:
                return
            worker, seconds = dead, self.config.trainer.startup_timeout_seconds
            while True:
                self.health[index] = self.health[index].died()
                said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
                if self.health[index].state is State.GIVEN_UP:
                    raise RolloutFailedError(
                        f"rollout worker {index} died again, after {self.health[index].restarts} replacements "
                        f"(rollout.max_restarts): {said}. Its log: {self.logs}/rollout-{index}.log"
                    ) from cause
                log.warning("rollout worker %d died and is replaced; its prompts are sampled again: %s", index, said)
                ray.kill(worker, no_restart=True)  # it may only be out of reach, and would hold its GPU
                worker = self._make(index)
                self.health[index] = self.health[index].restarted()
                limit = asyncio.timeout(seconds)
                try:
                    async with limit:
                        await self._start_again(index, worker)
                    break
                except RayActorError as error:
                    cause = error
                except TimeoutError:
                    if not limit.expired():
                        raise
                    raise RolloutFailedError(
                        f"rollout worker {index} died ({said}), and the one that replaces it was not ready after "
                        f"trainer.startup_timeout_seconds={seconds:g}"
                    ) from cause
            self.workers[index] = worker

    async def _start_again(self, index: int, worker: Any) -> None:
        """Load the engine and the present weights, also if they change meanwhile."""
        await worker.start.remote()
        given: Published | None = None
        while self._published is not given:
            given = self._published
            assert given is not None
            await self._confirmed(index, worker, given)

    @property
    def tolerance(self) -> float:
        """The configured canary tolerance, or the one that suits the precision."""
        rollout = self.config.rollout
        if rollout.canary_tolerance is not None:
            return rollout.canary_tolerance
        fp32 = rollout.dtype == "float32" or (rollout.dtype == "auto" and self.config.cluster.device == "cpu")
        return CANARY_TOLERANCE_FP32 if fp32 else CANARY_TOLERANCE_HALF
