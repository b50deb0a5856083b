"""All rollout workers: groups out, weights in, each worker's version confirmed, the dead replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.cluster.placement import Place, anywhere
from rlkit.config.schema import RunConfig
from rlkit.config.shares import gpu_shares
from rlkit.config.sharing import engines_sleep
from rlkit.rollout.health import Health, State
from rlkit.rollout.sampler import engine_environment, shared_gpus_environment
from rlkit.rollout.worker import GroupRequest, RolloutWorker, WeightReceipt
from rlkit.waiting import WaitedTooLongError, waiting

log = logging.getLogger(__name__)

CANARY_TOLERANCE_FP32 = 1e-3
CANARY_TOLERANCE_HALF = 0.15
SHOWN_GROUPS = 3
"""Of those that a wait is for."""


class WeightsNotLoadedError(RuntimeError):
    """A worker samples with other weights than it was given."""


class RolloutFailedError(RuntimeError):
    """Rollout workers die more often than `rollout.max_restarts` allows; the message has the last cause."""


@dataclass(frozen=True)
class Published:
    """The weights that every worker must hold now."""

    bundle: Any
    """Reference to a WeightBundle; None where the learner sends weights directly."""
    version: int
    canary: tuple[int, ...]
    wanted: np.ndarray
    """[len(canary) - 1] the learner's log-probs of the canary."""


Fetch = Callable[[], Awaitable[Published]]
"""Gives the learner's present weights as a bundle."""


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
        self.fetch: Fetch | None = None
        """Where a worker that takes a dead one's place gets weights that were published without a bundle."""

    def _make(self, index: int) -> Any:
        import ray

        config = self.config
        gpus, place = gpu_shares(config).engine, dict(self._place(index))
        environment = engine_environment(config.cluster.device, config.cluster.threads_per_actor)
        if own := place.pop("runtime_env", {}).get("env_vars"):  # an engine over several GPUs that it shares
            environment |= {**own, **shared_gpus_environment(gpus)}
        kind = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0, max_concurrency=1000)(RolloutWorker)
        return kind.options(runtime_env={"env_vars": environment}, **place).remote(
            self.model_path, config, str(self.logs / f"rollout-{index}.log")
        )

    async def start(self) -> None:
        """Load all engines."""
        await asyncio.gather(*(self._start(index, worker) for index, worker in enumerate(self.workers)))
        if engines_sleep(self.config):
            await self.sleep(2)  # the learner loads next; weights are published before anything is sampled

    async def _start(self, index: int, worker: Any) -> None:
        async with self._waiting(index, "to load its engine", "startup_timeout_seconds"):
            await worker.start.remote()

    def _waiting(self, index: int, what: str | Callable[[], str], key: str) -> AbstractAsyncContextManager[None]:
        """A wait for a worker; `key` of the trainer's section is its deadline."""
        told = f"rollout worker {index}"
        text = f"{told} {what}" if isinstance(what, str) else lambda: f"{told} {what()}"
        return waiting("the rollout pool", text, getattr(self.config.trainer, key), f"trainer.{key}")

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

        def sampling() -> str:
            some = list(left.values())
            names = ", ".join(f"{request.id} of prompt {request.prompt.id}" for request in some[:SHOWN_GROUPS])
            more = ", ..." if len(some) > SHOWN_GROUPS else ""
            return f"to sample {len(some)} of {len(share)} groups: {names}{more}"

        while left:
            worker = self.workers[index]
            try:
                groups: Any = None
                async with self._waiting(index, sampling, "step_timeout_seconds"):
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
        ready = await self.prepare(Published(bundle, version, tuple(canary), wanted))
        await self.give(ready)
        return await self.confirm(ready)

    async def prepare(self, published: Published) -> dict[int, Any]:
        """Announce weights; the workers, by place, that are ready to receive them. The dead are left to `confirm`."""
        self._published = published
        return await self._living(dict(enumerate(self.workers)), "prepare")

    async def give(self, ready: Mapping[int, Any]) -> None:
        """Let workers that are ready take the announced weights out of Ray's object store."""
        assert self._published is not None
        await self._living(ready, "take", self._published.bundle)

    async def arrival(self, ready: Mapping[int, Any]) -> None:
        """Returns when the learner's transfer has reached workers that were ready for it.

        Raises WeightsNotLoadedError if one of them dies meanwhile: the others then wait for ever.
        """
        from ray.exceptions import RayActorError

        async def one(index: int, worker: Any) -> None:
            try:
                async with self._waiting(index, "to receive weights from the learner", "step_timeout_seconds"):
                    await worker.arrival.remote()
            except RayActorError as error:
                said = str(error).strip().splitlines()[0]
                raise WeightsNotLoadedError(
                    f"rollout worker {index} died while the learner was sending it weights, which cannot go on without "
                    f"one of its ends: {said}. resume=auto goes on from the newest checkpoint"
                ) from error

        await asyncio.gather(*(one(index, worker) for index, worker in ready.items()))

    async def confirm(self, received: Mapping[int, Any], checksum: str | None = None) -> float:
        """Check every worker and replace the dead; the largest canary difference. Afterwards all sample again.

        `checksum` is the learner's; of a bundle, the worker has checked it. Raises WeightsNotLoadedError.
        """
        published = self._published
        assert published is not None
        places = range(len(self.workers))
        return max(await asyncio.gather(*(self._confirm(i, published, received.get(i), checksum) for i in places)))

    async def sleep(self, level: int) -> None:
        """Let all engines give up their GPUs' memory (see RolloutWorker.sleep)."""
        await self._living(dict(enumerate(self.workers)), "sleep", level)

    async def wake(self) -> None:
        """After a sleep of level 1."""
        await self._living(dict(enumerate(self.workers)), "wake")

    async def _living(self, workers: Mapping[int, Any], method: str, *arguments: Any) -> dict[int, Any]:
        """Call a method; those that did it. A dead one is found again, and replaced, when weights are confirmed."""
        from ray.exceptions import RayActorError

        async def one(index: int, worker: Any) -> bool:
            try:
                async with self._waiting(index, f"to answer `{method}`", "step_timeout_seconds"):
                    await getattr(worker, method).remote(*arguments)
            except RayActorError:
                return False
            return True

        alive = await asyncio.gather(*(one(index, worker) for index, worker in workers.items()))
        return {index: worker for (index, worker), did in zip(workers.items(), alive, strict=True) if did}

    async def _confirm(self, index: int, published: Published, receiver: Any | None, checksum: str | None) -> float:
        from ray.exceptions import RayActorError

        worker = self.workers[index]
        try:
            if receiver is None or worker is not receiver:
                return await self._confirmed(index, worker, published)
            async with self._waiting(index, f"to confirm version {published.version}", "step_timeout_seconds"):
                receipt = await receiver.confirm.remote(list(published.canary))
            return self._judged(index, published, receipt, checksum)
        except RayActorError as error:
            await self._replace(index, worker, error)
        if not self.health[index].may_sample(published.version):  # it was replaced while these weights were published
            return await self._confirmed(index, self.workers[index], published)
        return 0.0

    async def _confirmed(self, index: int, worker: Any, published: Published) -> float:
        """Let a worker load weights out of the object store; its canary difference, if it is small enough."""
        if published.bundle is None:
            assert self.fetch is not None
            published = await self.fetch()
        async with self._waiting(index, f"to load weights of version {published.version}", "step_timeout_seconds"):
            receipt = await worker.load_weights.remote(published.bundle, list(published.canary))
        return self._judged(index, published, receipt)

    def _judged(self, index: int, published: Published, receipt: WeightReceipt, checksum: str | None = None) -> float:
        """Whether a worker has the weights and samples from them; its canary difference."""
        if receipt.version != published.version:
            raise WeightsNotLoadedError(
                f"rollout worker {index} has weights of version {receipt.version}, not {published.version}"
            )
        if checksum not in (None, receipt.checksum):
            raise WeightsNotLoadedError(
                f"rollout worker {index}: weights of version {published.version} arrived damaged: their checksum is "
                f"{receipt.checksum}, the learner's is {checksum}"
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

        async with self._repairs[index]:  # held for as long as `rollout.max_restarts` starts may take
            if self.workers[index] is not dead:
                return
            worker = dead
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
                try:
                    async with self._waiting(index, "to be replaced", "startup_timeout_seconds"):
                        await self._start_again(index, worker)
                    break
                except RayActorError as error:
                    cause = error
                except WaitedTooLongError as late:
                    raise RolloutFailedError(f"rollout worker {index} died ({said}), and {late}") from cause
            self.workers[index] = worker

    async def _start_again(self, index: int, worker: Any) -> None:
        """Load the engine and the present weights, also if they change meanwhile."""
        await self._start(index, worker)
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
