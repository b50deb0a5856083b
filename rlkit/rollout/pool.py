"""All rollout workers: groups out, weights in; every version is confirmed, and failed workers are replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from statistics import fmean
from typing import Any

from rlkit.cluster.placement import Place, anywhere
from rlkit.cluster.waiting import WaitedTooLongError, waiting
from rlkit.config.plan import engines_sleep, gpu_shares, sleep_level
from rlkit.config.schema import RunConfig
from rlkit.experience import UserError
from rlkit.rollout.dealing import Loads, responses
from rlkit.rollout.engine import canary_tolerance, engine_environment, shared_gpus_environment
from rlkit.rollout.health import Health, State
from rlkit.rollout.requests import GroupRequest, sample_seed
from rlkit.weights.publication import Agreement, Canary, Proof, Published, WeightReceipt, WeightsNotLoadedError

log = logging.getLogger(__name__)

SHOWN_GROUPS = 3
"""How many group ids a timeout message lists."""


class RolloutFailedError(UserError):
    """Raised if rollout workers die more often than `rollout.max_restarts` allows; the message has the last cause."""


Fetch = Callable[[], Awaitable[Published]]
"""Returns the learner's current weights as a bundle."""


class RolloutPool:
    """Used from the driver's asyncio loop."""

    def __init__(self, config: RunConfig, model_path: str, logs: Path, place: Place = anywhere) -> None:
        """`place(i)`: Ray's scheduling options for worker i and its replacements."""
        self.config, self.model_path, self.logs, self._place = config, model_path, logs, place
        self.workers = [self._make(i) for i in range(config.rollout.workers)]
        self.health = [Health(config.rollout.max_restarts) for _ in self.workers]
        self._proofs = [Proof() for _ in self.workers]
        self._repairs = [asyncio.Lock() for _ in self.workers]
        self._loads = Loads(len(self.workers), config.rollout.max_concurrent_samples, self._has_finished)
        self._published: Published | None = None
        self._loading: dict[int, tuple[Any, Any]] = {}  # worker loading unannounced weights, its future receipt
        self.fetch: Fetch | None = None  # weights for a replacement when they were published without a bundle

    def _make(self, index: int) -> Any:
        import ray

        from rlkit.rollout.worker import RolloutWorker

        config = self.config
        gpus, place = gpu_shares(config).engine, dict(self._place(index))
        environment = engine_environment(config.cluster.device, config.cluster.threads_per_actor)
        if own := place.pop("runtime_env", {}).get("env_vars"):  # an engine on several shared GPUs
            environment |= {**own, **shared_gpus_environment(gpus)}
        kind = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0, max_concurrency=1000)(RolloutWorker)
        return kind.options(runtime_env={"env_vars": environment}, **place).remote(
            self.model_path,
            config,
            str(self.logs / f"rollout-{index}.log"),
            sample_seed(config.seed, "engine", index),  # engines with equal seeds would draw the same noise
        )

    def _end(self, worker: Any) -> None:
        import ray

        ray.kill(worker, no_restart=True)

    def close(self) -> None:
        for worker in self.workers:
            self._end(worker)

    async def start(self) -> None:
        await asyncio.gather(*(self._start(index, worker) for index, worker in enumerate(self.workers)))
        if engines_sleep(self.config):
            # The learner loads next, and weights are published before anything is sampled.
            await self.sleep(sleep_level(self.config))

    async def _start(self, index: int, worker: Any) -> None:
        async with self._waiting(index, "to load its engine", "startup_timeout_seconds"):
            await worker.start.remote()

    def _waiting(self, index: int, what: str | Callable[[], str], key: str) -> AbstractAsyncContextManager[None]:
        """Return a context manager with the deadline `key`, a field of the trainer's configuration."""
        who = f"rollout worker {index}"
        text = f"{who} {what}" if isinstance(what, str) else lambda: f"{who} {what()}"
        return waiting("the rollout pool", text, getattr(self.config.trainer, key), f"trainer.{key}")

    async def places(self, responses: int) -> int:
        """Return how many more groups of `responses` responses fill the engines; wait until one has a free slot."""
        return await self._loads.free(responses)

    async def _has_finished(self, index: int, at_least: int) -> int | None:
        from ray.exceptions import RayError

        try:
            return int(await self.workers[index].has_finished.remote(at_least))
        except RayError:  # whoever samples on that worker gets the error, too
            return None

    def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
        """Assign requests to workers at once, and yield references to lists of groups as they finish, from all workers.

        A replacement samples again, with the same seeds, what a dead worker had not handed over. Raises
        RolloutFailedError if workers die too often.
        """
        return self._stream(self._loads.deal(requests))

    async def _stream(self, shares: Sequence[Sequence[GroupRequest]]) -> AsyncIterator[Any]:
        finished: asyncio.Queue[Any] = asyncio.Queue()

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
        from ray.exceptions import RayActorError

        left = {request.id: request for request in share}

        def sampling() -> str:
            some = list(left.values())
            names = ", ".join(f"{request.id} of prompt {request.prompt.id}" for request in some[:SHOWN_GROUPS])
            more = ", ..." if len(some) > SHOWN_GROUPS else ""
            return f"to sample {len(some)} of {len(share)} groups: {names}{more}"

        try:
            while left:
                worker, load = self.workers[index], self._loads[index]
                try:
                    groups: Any = None
                    async with self._waiting(index, sampling, "step_timeout_seconds"):
                        async for ref in worker.generate.options(num_returns="streaming").remote(list(left.values())):
                            if groups is None:
                                groups = ref
                                continue
                            ids, load.finished = await ref
                            for group_id in ids:
                                self._loads[index].handed_over += left.pop(group_id).responses
                            await self._loads.tell()
                            finished.put_nowait(groups)
                            groups = None
                        if groups is not None:
                            await groups  # then not groups but the error that ended the stream
                except RayActorError as error:
                    await self._replace(index, worker, error)
        finally:
            self._loads[index].dealt -= responses(list(left.values()))
            await self._loads.tell()

    def load(self, bundle: Any, canary: Canary) -> None:
        """Let workers load weights from Ray's object store once they arrive; then `announce` and `confirm` them."""
        self._loading = {i: (w, w.load_weights.remote(bundle, canary)) for i, w in enumerate(self.workers)}

    def announce(self, published: Published) -> None:
        """Require these weights of all workers from now on, and of replacements for dead ones."""
        self._published = published

    async def prepare(self, published: Published) -> dict[int, Any]:
        """Announce weights. Returns the workers, by index, that are ready for them; `confirm` deals with dead ones."""
        self.announce(published)
        return await self._call_alive(dict(enumerate(self.workers)), "prepare")

    async def give(self, ready: Mapping[int, Any]) -> None:
        """Let ready workers load the announced weights from Ray's object store."""
        assert self._published is not None
        await self._call_alive(ready, "take", self._published.bundle)

    async def arrival(self, ready: Mapping[int, Any]) -> None:
        """Return when the learner's transfer has reached all ready workers.

        Raises WeightsNotLoadedError if one dies or fails meanwhile: the others would wait forever.
        """
        from ray.exceptions import RayActorError, RayTaskError

        async def one(index: int, worker: Any) -> None:
            try:
                async with self._waiting(index, "to receive weights from the learner", "step_timeout_seconds"):
                    await worker.arrival.remote()
            except (RayActorError, RayTaskError) as error:
                raise WeightsNotLoadedError(
                    f"rollout worker {index} {_end_of(error)} while the learner was sending it weights, and a "
                    f"transfer needs both ends: {_cause_of(error)}. Its log: {self._log(index)}. resume=auto continues "
                    "from the newest checkpoint"
                ) from error

        await asyncio.gather(*(one(index, worker) for index, worker in ready.items()))

    async def confirm(self, received: Mapping[int, Any], checksum: str | None = None) -> Agreement:
        """Check every worker's receipt for the announced weights; return the weakest agreement with the learner.

        Dead or failing workers are replaced. Raises WeightsNotLoadedError at once if all fail (then the workers are not
        the cause), or when `rollout.max_restarts` is used up. `checksum`: the learner's, for a direct transfer.
        """
        published, workers = self._published, list(self.workers)
        assert published is not None
        outcomes = await asyncio.gather(
            *(self._confirm_one(i, worker, published, received.get(i), checksum) for i, worker in enumerate(workers))
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, WeightsNotLoadedError)]
        if refused and all(isinstance(outcome, Exception) for outcome in outcomes):
            raise refused[0]
        agreements = (
            self._replace_until_confirmed(i, published, workers[i], outcome) for i, outcome in enumerate(outcomes)
        )
        return Agreement.weakest(await asyncio.gather(*agreements))

    def times(self) -> dict[str, float]:
        """Return the engines' times for the weights confirmed last; empty if all workers have been replaced since."""
        receipts = [proof.last for proof in self._proofs if proof.last is not None]
        if not receipts:
            return {}
        return {
            "time/engine_idle": fmean(receipt.idle for receipt in receipts),
            "time/frozen": max(receipt.frozen for receipt in receipts),
        }

    async def sleep(self, level: int) -> None:
        await self._call_alive(dict(enumerate(self.workers)), "sleep", level)

    async def wake(self) -> None:
        await self._call_alive(dict(enumerate(self.workers)), "wake")

    async def _call_alive(self, workers: Mapping[int, Any], method: str, *arguments: Any) -> dict[int, Any]:
        """Call a method; return the workers that answered. `confirm` replaces dead ones."""
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

    async def _confirm_one(
        self, index: int, worker: Any, published: Published, receiver: Any | None = None, checksum: str | None = None
    ) -> Agreement | Exception:
        """Return a worker's agreement, or why it cannot be used. Workers other than `receiver` load a bundle first."""
        from ray.exceptions import RayActorError

        proof = self._proofs[index]
        try:
            if receiver is None or worker is not receiver:
                return await self._load_and_admit(index, worker, published, proof)
            async with self._waiting(index, f"to confirm version {published.version}", "step_timeout_seconds"):
                receipt = await receiver.confirm.remote(published.canary)
            return await self._admit_if_proved(index, worker, published, receipt, proof, checksum)
        except (RayActorError, WeightsNotLoadedError) as error:
            return error

    async def _replace_until_confirmed(
        self, index: int, published: Published, worker: Any, outcome: Agreement | Exception
    ) -> Agreement:
        """Return the agreement of a worker, or of its first usable replacement."""
        while isinstance(outcome, Exception):
            await self._replace(index, worker, outcome)
            if self.health[index].may_sample(published.version):
                return Agreement(0.0)
            worker = self.workers[index]  # replaced while these weights were being published
            outcome = await self._confirm_one(index, worker, published)
        return outcome

    async def _load_and_admit(self, index: int, worker: Any, published: Published, proof: Proof) -> Agreement:
        loading, receipt = self._loading.pop(index, (None, None))
        if loading is not worker:
            if published.bundle is None:
                assert self.fetch is not None
                published = await self.fetch()
            receipt = worker.load_weights.remote(published.bundle, published.canary)
        async with self._waiting(index, f"to load weights of version {published.version}", "step_timeout_seconds"):
            receipt = await receipt
        return await self._admit_if_proved(index, worker, published, receipt, proof)

    async def _admit_if_proved(
        self,
        index: int,
        worker: Any,
        published: Published,
        receipt: WeightReceipt,
        proof: Proof,
        checksum: str | None = None,
    ) -> Agreement:
        """Check a receipt and admit its worker. Raises WeightsNotLoadedError if `proof` is a former process's."""
        who = f"rollout worker {index}"
        agreement = proof.accept(who, published, receipt, checksum, canary_tolerance(self.config))
        if proof is not self._proofs[index]:
            raise WeightsNotLoadedError(f"{who} died after it had confirmed version {published.version}")
        worker.admit.remote()  # the worker hands nothing over before
        self.health[index] = self.health[index].confirmed(published.version)
        return agreement

    async def _replace(self, index: int, failed: Any, cause: Exception) -> None:
        """Replace a dead or untrusted worker and give the new process the current weights. Only the first caller acts.

        Raises RolloutFailedError if the new process is not ready in time, or after `rollout.max_restarts` replacements
        (WeightsNotLoadedError if the last one could not confirm its weights).
        """
        from ray.exceptions import RayActorError, RayTaskError

        async with self._repairs[index]:  # held for as long as all `rollout.max_restarts` starts may take
            worker = failed
            while self.workers[index] is failed:
                self.health[index] = self.health[index].died()
                if self.health[index].state is State.GIVEN_UP:
                    raise self._out_of_restarts(index, cause) from cause
                lost = f"rollout worker {index} {_end_of(cause)}"
                log.warning("%s and is being replaced; its prompts are sampled again: %s", lost, _cause_of(cause))
                self._end(worker)  # it may merely be unreachable, and would keep its GPU
                worker = self._make(index)
                self._proofs[index] = Proof()
                self.health[index] = self.health[index].restarted()
                try:
                    await self._start(index, worker)
                except (RayActorError, RayTaskError) as error:
                    cause = error
                    continue
                except WaitedTooLongError as late:
                    raise RolloutFailedError(f"{lost} ({_cause_of(cause)}), and {late}") from cause
                try:
                    await self._bring_up_to_date(index, worker)
                except (RayActorError, WeightsNotLoadedError) as error:
                    cause = error
                    continue
                self.workers[index] = worker
                await self._loads.again(index)

    async def _bring_up_to_date(self, index: int, worker: Any) -> None:
        current: Published | None = None
        while self._published is not current:  # a new version may be published meanwhile
            current = self._published
            assert current is not None
            await self._load_and_admit(index, worker, current, self._proofs[index])

    def _out_of_restarts(self, index: int, cause: Exception) -> Exception:
        times = f"after {self.health[index].restarts} replacements (rollout.max_restarts)"
        if isinstance(cause, WeightsNotLoadedError):
            return WeightsNotLoadedError(f"{cause}, {times}. Its log: {self._log(index)}")
        return RolloutFailedError(
            f"rollout worker {index} {_end_of(cause)} again, {times}: {_cause_of(cause)}. Its log: {self._log(index)}"
        )

    def _log(self, index: int) -> Path:
        return self.logs / f"rollout-{index}.log"


def _end_of(error: Exception) -> str:
    from ray.exceptions import RayTaskError

    if isinstance(error, WeightsNotLoadedError):
        return "did not confirm its weights"
    return "failed" if isinstance(error, RayTaskError) else "died"


def _cause_of(error: Exception) -> str:
    """Return the first line of the cause; for an error inside an actor, its own message instead of Ray's report."""
    from ray.exceptions import RayTaskError

    own = error.cause if isinstance(error, RayTaskError) else error
    kind, first = type(own).__name__, str(own).strip().partition("\n")[0]
    return f"{kind}: {first}" if own is not error else first or kind
