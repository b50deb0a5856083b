"""Requests waiting for a reward process: bounded, batched where they fit, dropped when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rlkit.experience import Group, GroupScores
from rlkit.experience.scores import RewardFailed, invalid_scores, report_on
from rlkit.experience.wire import tokens_of
from rlkit.serving.http.process import RewardProcess, WorkerBrokenError

log = logging.getLogger(__name__)

LONGEST_RETRY_SECONDS = 60
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Bucket bounds of the histograms."""
MOST_REASONS = 50
"""Rewards choose the wording of reasons: a new one for every sample must not fill the memory."""


class ServerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reasons: set[str] = set()
        self.requests = Counter("rlkit_requests", "Requests answered", ["status"], registry=self.registry)
        self.samples = Counter("rlkit_samples", "Samples judged", registry=self.registry)
        self.failed = Counter("rlkit_failed_samples", "Samples without a score", ["reason"], registry=self.registry)
        self.restarts = Counter(
            "rlkit_worker_failures", "Calls that cost a process", ["reason"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "rlkit_request_seconds", "From request to answer", buckets=SECONDS, registry=self.registry
        )
        self.scoring_seconds = Histogram(
            "rlkit_scoring_seconds", "One call of the reward", buckets=SECONDS, registry=self.registry
        )
        self.batch_samples = Histogram(
            "rlkit_batch_samples", "Samples scored together", buckets=(1, 4, 16, 64, 256, 1024), registry=self.registry
        )
        self.queued = Gauge("rlkit_queued_samples", "Samples waiting", registry=self.registry)

    def count_failures(self, failures: Mapping[str, int]) -> None:
        for reason, count in failures.items():
            self.failed.labels(self._label(reason)).inc(count)

    def count_worker_failure(self, reason: str) -> None:
        self.restarts.labels(self._label(reason.partition(":")[0])).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _label(self, reason: str) -> str:
        if reason not in self._reasons and len(self._reasons) >= MOST_REASONS:
            return "other"
        self._reasons.add(reason)
        return reason[:60]


class BusyError(Exception):
    """Raised if there is no answer now; try again after `retry_seconds`."""

    def __init__(self, message: str, retry_seconds: int, status: int = 503) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        self.status = status
        """HTTP status: 429 for too many requests, 503 if the server cannot answer."""


@dataclass(frozen=True)
class BatchLimits:
    """Limits on what is scored together (samples, tokens), and on waiting samples."""

    samples: int
    tokens: int
    queued_samples: int


@dataclass(eq=False)
class _Job:
    groups: list[Group]
    samples: int
    tokens: int
    deadline: float
    """`time.monotonic()` after which its client no longer waits."""
    result: asyncio.Future[list[GroupScores]]


class ScoringQueue:
    """Hands waiting requests to each process that becomes free."""

    def __init__(self, workers: Sequence[RewardProcess], limits: BatchLimits, metrics: ServerMetrics) -> None:
        self.workers, self.limits, self.metrics = workers, limits, metrics
        self._jobs: deque[_Job] = deque()
        self._queued_samples = 0
        self._arrived = asyncio.Condition()
        self._seconds_per_sample = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the processes. Raises RewardFailed if one cannot start; the others are then ended."""
        results = await asyncio.gather(*(worker.start() for worker in self.workers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in self.workers]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in self._jobs:
            _fail(job, BusyError("the server is shutting down", 5))
        self._jobs.clear()
        await asyncio.gather(*(worker.close() for worker in self.workers))

    async def score(self, groups: list[Group], wait_seconds: float | None) -> list[GroupScores]:
        """Return the groups' scores. Raises BusyError if there is no room, process or time."""
        samples = sum(len(group.samples) for group in groups)
        if not groups:
            return []
        if self._queued_samples and self._queued_samples + samples > self.limits.queued_samples:
            raise BusyError(f"{self._queued_samples} samples are already waiting", self._retry_seconds(), status=429)
        job = _Job(
            groups,
            samples,
            sum(map(tokens_of, groups)),
            math.inf if wait_seconds is None else time.monotonic() + wait_seconds,
            asyncio.get_running_loop().create_future(),
        )
        async with self._arrived:
            self._jobs.append(job)
            self._count(samples)
            self._arrived.notify()
        return await job.result

    async def _work(self, worker: RewardProcess) -> None:
        """Serve requests with a process; one that a call has killed is replaced before the next request."""
        while True:
            jobs: list[_Job] = []
            try:
                if worker.usable and not worker.alive:
                    with contextlib.suppress(RewardFailed):  # the next request tries again and gets the reason
                        await worker.start()
                jobs = await self._next()
                await self._score_together(worker, jobs)
            except RewardFailed as error:
                log.error("%s", error)
                for job in jobs:
                    _fail(job, BusyError(str(error), 5))
            except Exception as error:  # a bug, but later requests still need this loop
                log.exception("scoring %d requests failed", len(jobs))
                for job in jobs:
                    _fail(job, BusyError(f"the server failed: {type(error).__name__}: {error}", 5))
            finally:
                for job in jobs:  # only if cancelled: the others have a result
                    _fail(job, BusyError("the server is shutting down", 5))

    async def _next(self) -> list[_Job]:
        """Wait for the oldest job, and take those after it that fit into the same call."""
        async with self._arrived:
            while True:
                while not self._jobs:
                    await self._arrived.wait()
                jobs: list[_Job] = []
                samples = tokens = 0
                while self._jobs:
                    job = self._jobs[0]
                    full = samples + job.samples > self.limits.samples or tokens + job.tokens > self.limits.tokens
                    if jobs and full:
                        break
                    self._jobs.popleft()
                    self._count(-job.samples)
                    if self._abandoned(job):
                        continue
                    jobs.append(job)
                    samples, tokens = samples + job.samples, tokens + job.tokens
                if jobs:
                    return jobs

    def _abandoned(self, job: _Job) -> bool:
        """Return whether nobody waits for the job any more; if so, end it."""
        if time.monotonic() > job.deadline:
            _fail(job, BusyError("it waited longer than its client", self._retry_seconds()))
        return job.result.done()

    async def _score_together(self, worker: RewardProcess, jobs: Sequence[_Job]) -> None:
        """Score jobs in one call; if the process does not survive, score each alone to lose only the culprit."""
        try:
            scored = await self._call(worker, [group for job in jobs for group in job.groups])
        except WorkerBrokenError as broken:
            self._note(broken)
            for job in jobs:
                await self._score_alone(worker, job)
            return
        remaining = iter(scored)
        for job in jobs:
            _finish(job, [next(remaining) for _ in job.groups])

    async def _score_alone(self, worker: RewardProcess, job: _Job) -> None:
        """Retry a job for no longer than its client waits."""
        # The first try has no such limit: it may have waited long in the queue, and the process works.
        if not worker.alive and not self._abandoned(job):
            await worker.start()
        if self._abandoned(job):
            return
        try:
            _finish(job, await self._call(worker, job.groups, job.deadline - time.monotonic()))
        except WorkerBrokenError as broken:
            self._note(broken)
            invalid = [invalid_scores(group, str(broken)) for group in job.groups]
            self._report(invalid)
            _finish(job, invalid)

    async def _call(
        self, worker: RewardProcess, groups: Sequence[Group], client_seconds: float = math.inf
    ) -> list[GroupScores]:
        began = time.monotonic()
        scored, _ = await worker.score(groups, client_seconds)
        seconds, samples = time.monotonic() - began, sum(len(group.samples) for group in scored)
        self.metrics.scoring_seconds.observe(seconds)
        self.metrics.batch_samples.observe(samples)
        self._seconds_per_sample = 0.8 * self._seconds_per_sample + 0.2 * seconds / max(samples, 1)
        self._report(scored)
        return scored

    def _report(self, judged: Sequence[GroupScores]) -> None:
        report = report_on(judged, 0.0)
        self.metrics.samples.inc(report.samples)
        self.metrics.count_failures(report.failures)

    def _note(self, broken: WorkerBrokenError) -> None:
        log.warning("%s; the process is replaced", broken)
        self.metrics.count_worker_failure(str(broken))

    def _count(self, samples: int) -> None:
        self._queued_samples += samples
        self.metrics.queued.set(self._queued_samples)

    def _retry_seconds(self) -> int:
        seconds = self._queued_samples * self._seconds_per_sample / len(self.workers)
        return min(max(1, math.ceil(seconds)), LONGEST_RETRY_SECONDS)


def _finish(job: _Job, judged: list[GroupScores]) -> None:
    if not job.result.done():
        job.result.set_result(judged)


def _fail(job: _Job, error: BusyError) -> None:
    if not job.result.done():
        job.result.set_exception(error)
