"""Reward workers as seen from the driver: every call has a deadline and one retry."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from rewards.base import RewardContext, RewardTraits, TrainableReward, UpdateWhen
from rlkit.cluster.placement import NO_GPU, Place, anywhere
from rlkit.cluster.waiting import WaitedTooLongError, waiting
from rlkit.config.parts import import_part
from rlkit.experience import Group, GroupScores
from rlkit.experience.scores import RewardFailed, ScoreReport, with_scores
from rlkit.serving.stored import Stored
from rlkit.serving.worker import RewardWorker, mark_invalid

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long a reward may take to free its resources before its process is killed."""
STARTUP = "trainer.startup_timeout_seconds"


@dataclass(frozen=True)
class Scored:
    scores: list[GroupScores]
    report: ScoreReport


@dataclass
class WorkerState:
    index: int
    actor: Any = None
    """None: the worker is dead, and restarted when needed."""
    pid: int | None = None
    busy_since: float | None = None
    """`time.monotonic()` at the start of its current call."""
    calls: int = 0
    restarts: int = 0

    def __str__(self) -> str:
        return f"reward worker {self.index}" + (f" (pid {self.pid})" if self.pid is not None else "")


PROCESS_LOST = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""Raised by Ray when the process of a call has died."""


class _Broken(Exception):
    """Raised after a worker was killed; the message is the samples' reason."""


class RewardPool:
    """Reward workers (Ray actors). Used from one event loop; calls beyond the number of workers wait."""

    def __init__(
        self,
        reward: Mapping[str, Any],
        context: RewardContext,
        startup_timeout_seconds: float,
        logs: Path | None = None,
        name: str = "reward",
        place: Place = anywhere,
    ) -> None:
        """`reward` is the reward section. Output of worker i and its replacements goes to `<name>-<i>.log` in `logs`.

        Raises PartError, or pydantic's ValidationError for an invalid section.
        """
        self.target: str = reward["_target_"]
        self._options = {key: value for key, value in reward.items() if key != "_target_"}
        self._kind = import_part("reward", self.target)
        self.config = self._kind.Config(**self._options)
        # Only rewards that can learn are asked: for others the answer may take a call to their server.
        learner = issubclass(self._kind, TrainableReward)
        self._traits: RewardTraits = self._kind.traits(self.config) if learner else RewardTraits()
        self._learnt = 0
        self._followed: Any = None
        self._context = context
        self._startup_timeout = startup_timeout_seconds
        self._told: set[str] = set()
        self._logs, self._name, self._place = logs, name, place
        self._workers = [WorkerState(index) for index in range(self.config.workers)]
        self._idle: asyncio.Queue[WorkerState] = asyncio.Queue()
        self._queued = 0
        """Number of calls that wait for a worker."""

    async def start(self) -> None:
        results = await asyncio.gather(*(self._start(worker) for worker in self._workers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def score(self, batches: Sequence[Any], chosen: Sequence[str] | None = None) -> Scored:
        """Score batches, each a list of groups or an object reference to one: all groups in order, or those with the
        `chosen` ids.

        A worker that misses the deadline, dies or raises is replaced and the call retried once; if that fails, all its
        samples are invalid. Raises what `ray.get` raises if a batch itself is lost.
        """
        # Put once, so that a retry does not send the tokens again and only references pass through the driver.
        refs = [batch if isinstance(batch, ray.ObjectRef) else ray.put(batch) for batch in batches]
        worker = await self._turn()
        try:
            reason = ""
            for then in ("the call is retried, in a new process if necessary", "its samples are invalid"):
                try:
                    return await self._score_once(worker, chosen, refs)
                except _Broken as broken:
                    reason = str(broken)
                    log.warning("reward worker %d (%s): %s; %s", worker.index, self.target, reason, then)
        finally:
            self._idle.put_nowait(worker)
        async with self._waiting("a task that marks samples as invalid", self._startup_timeout, STARTUP):
            return Scored(*await ray.remote(num_cpus=0)(mark_invalid).remote(reason, chosen, *refs))

    async def judge(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with their scores, in this process."""
        scored = await self.score([list(groups)])
        return with_scores(groups, scored.scores)

    async def _turn(self) -> WorkerState:
        """Wait for a free worker; the deadline is the longest that earlier calls may take."""
        if not self._idle.empty():
            return self._idle.get_nowait()
        self._queued += 1
        try:
            calls = math.ceil(self._queued / len(self._workers))
            seconds = calls * 2 * (self.config.timeout_seconds + 2 * self._startup_timeout)
            limit = f"{2 * calls} x (reward.timeout_seconds + 2 x {STARTUP})"
            async with self._waiting(
                lambda: f"its turn, as number {calls} in a worker's queue; {self._busy()}", seconds, limit
            ):
                return await self._idle.get()
        finally:
            self._queued -= 1

    def _busy(self) -> str:
        busy = [
            f"worker {worker['worker']} (pid {worker['pid']}) has been busy for {worker['busy_seconds']:.1f} s"
            for worker in self.health()
            if worker["busy_seconds"] is not None
        ]
        return ", ".join(busy) or "no worker is scoring"

    def _waiting(
        self, what: str | Callable[[], str], seconds: float, limit: str = "reward.timeout_seconds"
    ) -> AbstractAsyncContextManager[None]:
        return waiting(f"the {self._name} pool ({self.target})", what, seconds, limit)

    async def learn(
        self, groups: Sequence[Group], when: UpdateWhen, stored: Stored
    ) -> tuple[list[Group], dict[str, float]]:
        """Let a reward that learns `before` or `after` the policy's advantages learn from scored groups.

        Returns the groups, rescored if it learns before, and its metrics. Raises RewardFailed if it dies or misses the
        deadline.
        """
        if self._traits.update_when != when:
            return list(groups), {}
        scores = {group.id: group.scores for group in groups}
        metrics, new = await self._ask_learner("learn", scores, when == "before", *stored.references(groups))
        self._learnt += 1
        return list(groups) if new is None else with_scores(groups, new), metrics

    @property
    def follows_policy(self) -> bool:
        return self._traits.follows_policy

    async def follow(self, bundle: Any) -> None:
        """Pass the policy's weights (a reference to a WeightBundle), if the reward follows it."""
        if self.follows_policy:
            await self._ask_learner("follow", bundle)
            self._followed = bundle

    @property
    def _learns(self) -> bool:
        return self._traits.update_when != "none"

    async def save(self, folder: Path) -> None:
        if self._learns:
            await self._ask_learner("save", str(folder))

    async def save_state(self, file: Path) -> None:
        if self._learns:
            await self._ask_learner("save_state", str(file))

    async def load_state(self, file: Path) -> None:
        if self._learns:
            await self._ask_learner("load_state", str(file))
            self._learnt += 1

    async def _ask_learner(self, method: str, *arguments: Any) -> Any:
        """Call the only worker of a reward that learns; restart it if it died without having learnt anything.

        Raises RewardFailed if what it has learnt is lost.
        """
        worker = await self._turn()
        try:
            try:
                return await self._ask_once(worker, method, arguments)
            except PROCESS_LOST as error:
                self._kill(worker)
                log.warning("reward worker %d (%s) died in `%s`: %s", worker.index, self.target, method, error)
                return await self._ask_once(worker, method, arguments)
        except _Broken as broken:
            raise RewardFailed(f"`{method}` of reward {self.target} failed: {broken}") from broken
        except WaitedTooLongError as late:
            raise RewardFailed(f"`{method}` of reward {self.target} failed: {late}") from None
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise RewardFailed(f"`{method}` of reward {self.target} failed: {_first_line(cause)}") from error
        finally:
            self._idle.put_nowait(worker)

    async def _ask_once(self, worker: WorkerState, method: str, arguments: Sequence[Any]) -> Any:
        await self._living(worker)
        async with self._waiting(f"`{method}` of {worker}", self.config.timeout_seconds):
            return await getattr(worker.actor, method).remote(*arguments)

    async def _living(self, worker: WorkerState) -> None:
        """Restart a worker if it is dead. Raises RewardFailed if it had learnt, _Broken if it cannot start."""
        if worker.actor is None:
            if self._learnt:
                raise RewardFailed(f"the process of reward {self.target} died: what it learnt in this run is lost")
            await self._start_again(worker)

    def health(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        return [
            {
                "worker": worker.index,
                "pid": worker.pid,
                "alive": worker.actor is not None,
                "busy_seconds": None if worker.busy_since is None else now - worker.busy_since,
                "calls": worker.calls,
                "restarts": worker.restarts,
            }
            for worker in self._workers
        ]

    async def close(self) -> None:
        """End all workers; idle ones get a few seconds to free their resources."""
        idle = [worker for worker in self._workers if worker.actor is not None and worker.busy_since is None]
        closing = [self._close(worker) for worker in idle]
        for worker, result in zip(idle, await asyncio.gather(*closing, return_exceptions=True), strict=True):
            if isinstance(result, BaseException):
                log.warning("reward worker %d did not close cleanly: %r", worker.index, result)
        for worker in self._workers:
            self._kill(worker)

    async def _close(self, worker: WorkerState) -> None:
        async with self._waiting(f"`close` of {worker}", CLOSE_SECONDS, "CLOSE_SECONDS"):
            await worker.actor.close.remote()

    async def _score_once(self, worker: WorkerState, chosen: Sequence[str] | None, refs: Sequence[Any]) -> Scored:
        await self._living(worker)
        worker.busy_since = time.monotonic()
        finished = False
        try:
            async with self._waiting(f"{worker} to score {len(refs)} batches", self.config.timeout_seconds):
                scores, report = await worker.actor.score.remote(chosen, *refs)
            if report.error:
                log.warning("reward worker %d raised:\n%s", worker.index, report.error)
                finished = self._learnt > 0  # alive, with all it has learnt: it gets the retry itself
                raise _Broken("exception: " + report.error.strip().splitlines()[-1])
            finished = True
            for raised in set(report.tracebacks) - self._told:
                self._told.add(raised)
                log.warning("reward worker %d raised for a sample:\n%s", worker.index, report.tracebacks[raised])
        except WaitedTooLongError:
            raise _Broken(f"timeout: no answer within reward.timeout_seconds={self.config.timeout_seconds:g}") from None
        except PROCESS_LOST as error:
            raise _Broken(f"crash: the worker process {worker.pid} died: {_first_line(error)}") from error
        except asyncio.CancelledError:
            finished = self._learnt > 0  # the run's last checkpoint saves what it has learnt, after this call
            raise
        finally:
            worker.busy_since = None
            if not finished:  # when cancelled, the actor is still busy with this call
                self._kill(worker)
        worker.calls += 1
        return Scored(scores, report)

    async def _start_again(self, worker: WorkerState) -> None:
        """Replace a dead worker. Raises _Broken if it cannot start or load the policy's weights."""
        try:
            await self._start(worker)
            worker.restarts += 1
            if self._followed is not None:
                async with self._waiting(f"{worker} to load the policy's weights", self._startup_timeout, STARTUP):
                    await worker.actor.follow.remote(self._followed)
        except (RewardFailed, RayError) as error:
            self._kill(worker)
            raise _Broken(f"crash: the worker could not be restarted: {_first_line(error)}") from error
        except WaitedTooLongError:
            self._kill(worker)
            raise _Broken("crash: the new worker did not load the policy's weights in time") from None

    async def _start(self, worker: WorkerState) -> None:
        """Start a worker; on failure it is killed, and RewardFailed names the cause."""
        environment = {
            "OMP_NUM_THREADS": str(self._context.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # the sampler shares these cores
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        log_path = None if self._logs is None else str(self._logs / f"{self._name}-{worker.index}.log")
        if not self._context.gpus:
            environment |= NO_GPU
        kind = ray.remote(num_cpus=0, num_gpus=self._context.gpus, max_restarts=0)(RewardWorker)
        worker.actor = kind.options(runtime_env={"env_vars": environment}, **self._place(worker.index)).remote(
            self.target, self._options, self._context, log_path
        )
        started = False
        try:
            async with self._waiting(f"{worker} to start", self._startup_timeout, STARTUP):
                worker.pid = await worker.actor.start.remote()
            started = True
        except WaitedTooLongError:
            message = f"reward {self.target} was not ready after {self._startup_timeout:g} s"
            raise RewardFailed(message) from None
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise RewardFailed(f"reward {self.target} cannot start: {_first_line(cause)}") from error
        finally:
            if not started:
                self._kill(worker)

    def _kill(self, worker: WorkerState) -> None:
        if worker.actor is not None:
            ray.kill(worker.actor, no_restart=True)
            worker.actor = None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
