"""Runs the real producer, pool and buffer on a virtual clock: engines, reward and learner only let time pass.

An engine decodes a token of each running sample in `step_seconds + sample_seconds * running` seconds, in 64 slots;
samples without a slot wait. Response lengths are lognormal and depend only on the group's number: group 17 has the same
ones whatever the timing. New weights stop an engine for `publish_seconds` and while it recomputes its cached tokens.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from rlkit.config.schema import RolloutConfig, RunConfig, TrainerConfig
from rlkit.data.order import PromptOrder
from rlkit.experience import Group, GroupScores, Prompt, Sample, Score
from rlkit.experience.buffer import ExperienceBuffer
from rlkit.experience.filters import BufferConfig
from rlkit.experience.scores import ScoreReport
from rlkit.experience.waiting_buffer import WaitingBuffer
from rlkit.producer import Producer, until
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.pool import Scored
from rlkit.serving.unasked import NoReward
from rlkit.weights.publication import Loaded, Published, WeightReceipt

TOKENS = np.zeros(1 << 16, np.int32)
PROMPTS = [Prompt(f"p{i}", (), (0,)) for i in range(64)]
EXACT = 1e-6
"""Tolerance, in tokens, for rounding errors from adding up seconds."""


@dataclass(frozen=True)
class Case:
    engines: int = 8
    groups: int = 4
    """Groups per engine and training step."""
    staleness: int = 1
    samples: int = 8
    median: float = 1000.0
    """Median tokens of a response."""
    sigma: float = 1.0
    longest: int = 16000
    places: int = 64
    step_seconds: float = 0.012
    sample_seconds: float = 1e-4
    learner: float = 0.8
    """Time of an update, as a share of the time that engines which are always full need to sample a step."""
    reward_seconds: float = 0.0
    publish_seconds: float = 2.0
    recompute_seconds: float = 20e-6
    """Time per cached token."""
    evaluate_every: int = 0
    """In steps; 0: never. An evaluation has half as many responses as a step, one per prompt."""
    death_every: float = 0.0
    """In seconds; 0: never. Engines die in turn."""
    start_seconds: float = 60.0
    """Start-up time of an engine that replaces a dead one."""
    steps: int = 24
    uncounted: int = 6
    """Steps at the beginning whose time is not counted."""
    seed: int = 0

    @property
    def groups_per_step(self) -> int:
        return self.groups * self.engines

    def token_seconds(self, running: float) -> float:
        return self.step_seconds + self.sample_seconds * running

    @cached_property
    def lengths(self) -> np.ndarray:
        """[groups, samples], for more groups than any schedule starts; evaluations take theirs from the end."""
        rng = np.random.default_rng(self.seed)
        size = (2 * (self.steps + 8) * self.groups_per_step, self.samples)
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(size))
        return np.clip(drawn, 1, self.longest).astype(np.int64)

    @cached_property
    def full_seconds(self) -> float:
        """Time that engines which are always full need to sample a step."""
        tokens = self.groups * self.samples * float(self.lengths.mean())
        return tokens * self.token_seconds(self.places) / self.places

    @property
    def update_seconds(self) -> float:
        return self.learner * self.full_seconds


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer. It must not wait for anything outside the process."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__()
        self._selector: Any
        self._selector.select = self._jump

    def time(self) -> float:
        return self.now

    def _jump(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will happen any more")
        self.now += timeout
        return []


@dataclass
class Ref:
    """Stands in for Ray's reference to a value, for code that awaits it."""

    value: Any

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return self.value


class Actor:
    """Stands in for Ray's actor handle, around an object of this process."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.target, name)

        def remote(*arguments: Any) -> Any:
            work = method(*(a.value if isinstance(a, Ref) else a for a in arguments))
            return _refs(work) if inspect.isasyncgen(work) else asyncio.ensure_future(work)

        call = SimpleNamespace(remote=remote)
        call.options = lambda **_: call
        return call


async def _refs(items: AsyncIterator[Any]) -> AsyncIterator[Ref]:
    async for item in items:
        yield Ref(item)


@dataclass
class _Open:
    request: GroupRequest
    done: asyncio.Queue[Any]
    samples: dict[int, Sample] = field(default_factory=dict)


class Engine:
    """Has the interface of `rlkit.rollout.worker.RolloutWorker`."""

    def __init__(self, case: Case) -> None:
        self.case, self.loop = case, asyncio.get_running_loop()
        self.version = 0
        self.running: list[tuple[float, int, _Open, int, int, float]] = []
        """A heap: decoded tokens at its end, serial number, group, index, version and decoded tokens at its start."""
        self.waiting: deque[tuple[int, _Open, int]] = deque()
        """Length, group and index of each waiting sample."""
        self.decoded, self.at, self.serial = 0.0, 0.0, 0
        """Tokens that a sample running since the start would have; the time of that count; samples so far."""
        self.finished, self.changed = 0, asyncio.Event()
        self.stopped, self.dead = False, False
        self.timer: asyncio.TimerHandle | None = None
        self.streams: set[asyncio.Queue[Any]] = set()

    async def start(self) -> None:
        await asyncio.sleep(self.case.start_seconds if self.loop.time() else 0.0)

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
        await self._until(lambda: self.version >= max(request.oldest for request in requests))
        done: asyncio.Queue[Any] = asyncio.Queue()
        self.streams.add(done)
        for request in requests:
            group = _Open(request, done)
            self.waiting += ((length, group, i) for i, length in enumerate(self._lengths(request)))
        self.turn()
        left = len(requests)
        while left:
            ready = [await done.get()]
            while not done.empty():
                ready.append(done.get_nowait())
            for item in ready:
                if isinstance(item, BaseException):
                    raise item
            left -= len(ready)
            yield ready
            yield [group.id for group in ready], self.finished
        self.streams.discard(done)

    async def has_finished(self, at_least: int) -> int:
        await self._until(lambda: self.finished >= at_least)
        return self.finished

    async def _until(self, condition: Callable[[], bool]) -> None:
        self._alive()
        while not condition():
            self.changed.clear()
            await self.changed.wait()
            self._alive()

    def _lengths(self, request: GroupRequest) -> list[int]:
        table = self.case.lengths
        number = int(request.id) if request.id.isdigit() else -1 - int(request.id.rpartition("-")[2])
        lengths: list[int] = table[number][: request.samples].tolist()
        return lengths

    def turn(self) -> None:
        """Let the time since the last call pass, hand over finished samples, start waiting ones."""
        if self.dead:
            return
        now = self.loop.time()
        if not self.stopped:
            self.decoded += (now - self.at) / self.case.token_seconds(len(self.running))
            while self.running and self.running[0][0] <= self.decoded + EXACT:
                self._finish(*heapq.heappop(self.running))
            while self.waiting and len(self.running) < self.case.places:
                length, group, index = self.waiting.popleft()
                self.serial += 1
                entry = (self.decoded + length, self.serial, group, index, self.version, self.decoded)
                heapq.heappush(self.running, entry)
        self.at = now
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.running and not self.stopped:
            left = self.running[0][0] - self.decoded
            self.timer = self.loop.call_later(left * self.case.token_seconds(len(self.running)), self.turn)

    def _finish(self, end: float, serial: int, group: _Open, index: int, version: int, began: float) -> None:
        tokens = TOKENS[: round(end - began)]
        group.samples[index] = Sample(index, tokens, None, "", "stop", (version, self.version), 0)
        self.finished += 1
        self.changed.set()
        request = group.request
        if len(group.samples) == request.samples:
            samples = tuple(group.samples[i] for i in range(request.samples))
            group.done.put_nowait(Group(request.id, request.prompt, samples, step=request.step))

    async def load_weights(self, bundle: Any, canary: Any) -> WeightReceipt:
        self._alive()
        self.turn()
        assert self.case.staleness or not self.running, "synchronous training changes weights while it samples"
        self.stopped = True
        self.turn()
        cached = sum(self.decoded - entry[5] for entry in self.running)
        await asyncio.sleep(self.case.publish_seconds + cached * self.case.recompute_seconds)
        self._alive()
        self.version = bundle.version
        self.changed.set()
        loaded = Loaded(arrived=self.version, held=self.version)
        return WeightReceipt(self.version, "", "", np.zeros(1, np.float32), loaded)

    async def admit(self) -> None:
        self._alive()
        self.stopped, self.at = False, self.loop.time()
        self.turn()

    def die(self) -> None:
        self.dead = True
        if self.timer is not None:
            self.timer.cancel()
        self.changed.set()
        for stream in self.streams:
            stream.put_nowait(RayActorError())

    def _alive(self) -> None:
        if self.dead:
            raise RayActorError()


class SimulatedPool(RolloutPool):
    """The real pool with simulated engines."""

    def __init__(self, case: Case) -> None:
        self.case = case
        config = RunConfig(
            run_dir=Path("unused"),
            rollout=RolloutConfig(workers=case.engines, max_restarts=1000, max_concurrent_samples=case.places),
            trainer=TrainerConfig(max_staleness=case.staleness, step_timeout_seconds=1e6),
            algorithm={},
            reward={},
            data={},
            verifier={},
        )
        super().__init__(config, "no model", Path("unused"))

    def _make(self, index: int) -> Any:
        return Actor(Engine(self.case))

    def _end(self, worker: Any) -> None:
        worker.target.die()


class SimulatedReward(NoReward):
    """Scores any number of groups at a time."""

    def __init__(self, case: Case) -> None:
        self.seconds, self.scores = case.reward_seconds, GroupScores((Score.none(),) * case.samples)

    async def score(self, batches: Sequence[Any]) -> Scored:
        await asyncio.sleep(self.seconds)
        return Scored([self.scores for batch in batches for _ in await batch], ScoreReport())


@dataclass
class Run:
    """Record of what a schedule did."""

    ended: list[float] = field(default_factory=list)
    """Time at which each step's weights were published."""
    trained: list[list[str]] = field(default_factory=list)
    """Ids of each step's groups."""
    lengths: list[int] = field(default_factory=list)
    """Lengths of all trained responses."""
    staleness: list[int] = field(default_factory=list)
    """Staleness of the first token of each trained response."""
    dropped: int = 0
    started: int = 0
    """Groups started."""
    deaths: int = 0

    def seconds_per_step(self, uncounted: int) -> float:
        return (self.ended[-1] - self.ended[uncounted - 1]) / (len(self.ended) - uncounted)


def simulate(case: Case, make_buffer: Callable[[Case], WaitingBuffer] | None = None) -> Run:
    """Simulate a case; `make_buffer` creates a replacement for the real buffer with the same interface."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_train(case, (make_buffer or _real_buffer)(case)))


def _real_buffer(case: Case) -> WaitingBuffer:
    return WaitingBuffer(case.groups_per_step, case.staleness, BufferConfig())


async def _train(case: Case, buffer: WaitingBuffer) -> Run:
    """Train in the same order as `rlkit.trainer.Trainer.fit`."""
    run, pool, loop = Run(), SimulatedPool(case), asyncio.get_running_loop()
    producer = Producer(
        PromptOrder(PROMPTS, case.seed),
        pool,
        SimulatedReward(case),
        buffer,
        most_at_once=case.groups_per_step,
        waits_for_places=case.staleness > 0,
        samples_per_prompt=case.samples,
        greedy=False,
        seed=case.seed,
        step_timeout_seconds=1e6,
    )
    await pool.start()
    await _publish(pool, 0)
    producing = asyncio.create_task(producer.run())
    dying = asyncio.create_task(_kill(pool, case, run))
    for step in range(1, case.steps + 1):
        groups = await until(buffer.take(), producing)
        run.trained.append([group.id for group in groups])
        run.lengths += [len(sample) for group in groups for sample in group.samples]
        run.staleness += [step - 1 - sample.policy_versions[0] for group in groups for sample in group.samples]
        await asyncio.sleep(case.update_seconds)
        evaluates = case.evaluate_every and step % case.evaluate_every == 0
        # Buffers other than the real one learn of weights once they are published.
        early = not evaluates and isinstance(buffer.buffer, ExperienceBuffer)
        if early and step < case.steps:
            await buffer.advance(step)
        await until(_publish(pool, step), producing)
        run.ended.append(loop.time())
        if evaluates:
            await until(_evaluate(pool, case, step), producing)
        if not early and step < case.steps:
            await buffer.advance(step)
    for task in (producing, dying):
        task.cancel()
    await asyncio.gather(producing, dying, return_exceptions=True)
    run.started = producer.started
    passed_over = max(int(id) for step in run.trained for id in step) + 1 - sum(map(len, run.trained))
    run.dropped = getattr(buffer.buffer, "dropped", passed_over)  # out of order, a late group is not dropped yet
    return run


async def _publish(pool: RolloutPool, version: int) -> None:
    pool.announce(Published(SimpleNamespace(version=version), version, ((0, 0),), np.zeros(1, np.float32)))
    await pool.confirm({})


async def _evaluate(pool: RolloutPool, case: Case, step: int) -> None:
    count = case.groups_per_step * case.samples // 2
    requests = [GroupRequest(f"evaluation-{i}", PROMPTS[0], 1, 0, step) for i in range(count)]
    async for _ in pool.generate(requests):
        pass


async def _kill(pool: RolloutPool, case: Case, run: Run) -> None:
    while case.death_every:
        await asyncio.sleep(case.death_every)
        pool.workers[run.deaths % case.engines].target.die()
        run.deaths += 1
