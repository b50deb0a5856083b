"""A rollout worker: one sampler in a Ray actor that streams groups as they finish and takes weights between groups."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlkit.config.parts import TARGET
from rlkit.config.plan import engines_sleep, longest_response, published_adapter, sleep_level, weight_route
from rlkit.config.schema import RunConfig
from rlkit.config.structured import Grammar, grammar
from rlkit.experience import Group
from rlkit.models.folder import enter_working_folder
from rlkit.rollout.engine import stop_token_ids
from rlkit.rollout.episodes import Episodes, open_episodes
from rlkit.rollout.requests import GroupRequest, Request, Response, group_of, sample_seed
from rlkit.rollout.sampler import Sampler
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Canary, WeightReceipt

T = TypeVar("T")
_Done = asyncio.Queue[Group | BaseException]


@dataclass
class _Open:
    request: GroupRequest
    done: _Done
    responses: dict[int, Response] = field(default_factory=dict)


class RolloutWorker:
    """Every engine call runs in one thread, so steps and weight updates never overlap."""

    def __init__(self, model_path: str, config: RunConfig, log_path: str, engine_seed: int) -> None:
        """`engine_seed`: for this engine's own randomness, used by samples without a seed."""
        from rlkit.tracking.logs import actor_logging

        self.log = Path(log_path)
        actor_logging(self.log)
        enter_working_folder()
        self.model_path, self.config, self.rollout = model_path, config, config.rollout
        self.engine_seed = engine_seed
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.calls = 0
        """Number of pieces of work that the thread has, including the current one."""
        self.version = 0
        self.checksum = ""
        """Checksum of the last weights received."""
        self.announced: str | None = None
        """The checksum that came with those weights."""
        self.open: dict[str, _Open] = {}
        self.finished = 0
        """Number of responses finished so far."""
        self.progress = asyncio.Event()
        """Set when some have finished."""
        self.watchers = 0
        """Number of callers that wait for finished responses."""
        self.pump: asyncio.Task[None] | None = None
        self.episodes: Episodes | None = None
        self.playing: set[asyncio.Task[None]] = set()
        self.asked: deque[Request] = deque()
        """Turns of episodes that the engine has not been given yet."""
        self.turns: dict[str, asyncio.Future[Response]] = {}
        self.work = asyncio.Event()
        """Set when the engine loop has something to do, or a reason to end."""
        self.admission = asyncio.Condition()
        """Held to admit groups; notified when new weights have arrived."""
        self.closed = False
        """True in synchronous training from `prepare` until the new weights have arrived: no group is admitted."""
        self.accepted = asyncio.Event()
        """Cleared from `prepare` until the pool accepts the receipt (`admit`): nothing is handed over."""
        self.accepted.set()
        self.in_flight = config.trainer.max_staleness > 0
        """Whether new weights arrive between two engine steps, and running requests continue with them."""
        self.going = asyncio.Event()
        """Cleared while weights arrive in flight: the engine does not step."""
        self.going.set()
        self.parked = False
        """Whether turns of episodes wait for weights: none begins."""
        self.busy_seconds = 0.0
        """Working time of the engine since the last receipt."""
        self.receipt_at = self.stopped_at = time.monotonic()
        """When the last receipt was given; when the engine last stopped for weights."""
        self.arrived = asyncio.Event()
        """Set when a transfer has completed or failed."""
        self.failure: Exception | None = None
        """The error that ended the last transfer."""

    async def start(self) -> None:
        """Load the engine and generate once, so that the first step finds everything warm; start the environment."""
        await self._in_thread(self._load)
        if self.config.environment[TARGET] is not None:
            stops, log = self.sampler.stop_token_ids, self.log.with_name(f"environment-of-{self.log.name}")
            self.episodes = await open_episodes(
                self.config, self.tokenizer, stops, self.turn, lambda: self.version, log, seeded=self.seeded
            )

    def _load(self) -> None:
        from rlkit.data.rendering import load_tokenizer

        config = self.config
        trusted = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(self.model_path, trust_remote_code=trusted)
        self.sampler = Sampler(
            self.model_path,
            self.rollout.model_copy(update={"max_response_tokens": longest_response(self.rollout, config.evaluation)}),
            device=config.cluster.device,
            seed=self.engine_seed,
            stop_token_ids=stop_token_ids(self.model_path, self.tokenizer),
            trust_remote_code=trusted,
            route=weight_route(config.cluster, config.rollout, config.learner, config.model),
            sleeps=engines_sleep(config),
            lora=published_adapter(config.cluster, config.rollout, config.model),
        )
        self.grammar = self._grammar()
        self.sampler.add(Request("warm-up", [self.sampler.stop_token_ids[0]], 0, 2, 1.0, self.grammar))
        while self.sampler.busy:
            self.sampler.step()
        if engines_sleep(config):
            # The learner loads on the same GPU, and weights arrive before anything is sampled.
            self.sampler.sleep(sleep_level(config))

    @property
    def seeded(self) -> bool:
        """Whether each sample has a seed."""
        asked = self.rollout.sample_seeds
        return bool(self.sampler.affords_seeds) if asked == "auto" else asked == "always"

    def _grammar(self) -> Grammar | None:
        """Return the grammar that all responses must match, if it is the same for all."""
        structured = self.rollout.structured
        return None if structured is None or structured.column is not None else grammar(structured, {})

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[tuple[list[str], int] | list[Group]]:
        """Yield all groups that finished since the last yield (at least one), then their ids and how many responses the
        engine has finished.

        The latter are a separate, small item: the driver reads it as proof that the groups have arrived.
        """
        done: _Done = asyncio.Queue()
        follows = self.rollout.source == "policy"  # otherwise no weights ever arrive
        oldest = max(request.oldest for request in requests) if follows else 0
        async with self.admission:
            await self.admission.wait_for(lambda: self.version >= oldest and not self.closed)
            try:
                if self.config.environment[TARGET] is not None:
                    if self.episodes is None:  # never replace an episode by a single response
                        raise RuntimeError("the environment has not started")
                    self._play(self.episodes, requests, done)
                else:
                    await self._in_thread(lambda: self._submit(requests, done))
            except BaseException:
                for request in requests:  # otherwise the engine loop would wait for what was never queued
                    self.open.pop(request.id, None)
                raise
            finally:
                self.work.set()
            if self.pump is None or self.pump.done():
                self.pump = asyncio.create_task(self._run_engine())
        left = len(requests)
        while left:
            groups: list[Group] = []
            while not groups or not done.empty():
                item = await done.get()
                if isinstance(item, BaseException):
                    raise item
                groups.append(item)
            left -= len(groups)
            await self.accepted.wait()
            yield groups
            yield [group.id for group in groups], self.finished

    async def has_finished(self, at_least: int) -> int:
        """Return how many responses are finished; wait until at least `at_least` are."""
        self.watchers += 1
        try:
            while self.finished < at_least:
                self.progress.clear()
                await self.progress.wait()
        finally:
            self.watchers -= 1
        return self.finished

    def _submit(self, requests: Sequence[GroupRequest], done: _Done) -> None:
        structured = self.rollout.structured
        for request in requests:
            self.open[request.id] = _Open(request, done)
            temperature = self.rollout.temperature if request.temperature is None else request.temperature
            required = None if structured is None else self.grammar or grammar(structured, request.prompt.columns)
            for index in range(request.responses):
                self.sampler.add(
                    Request(
                        id=f"{request.id}:{index}",
                        prompt=request.prompt.token_ids,
                        seed=sample_seed(request.seed, request.id, index) if self.seeded else None,
                        max_tokens=request.max_response_tokens or self.rollout.max_response_tokens,
                        temperature=temperature if index < request.samples else 0.0,
                        grammar=required,
                    )
                )

    def _play(self, episodes: Episodes, requests: Sequence[GroupRequest], done: _Done) -> None:
        async def play(request: GroupRequest) -> None:
            try:
                done.put_nowait(await episodes.group(request))
            except Exception as error:
                done.put_nowait(error)
            finally:
                self.open.pop(request.id, None)
                self.finished += request.responses
                self.progress.set()
                self.work.set()

        for request in requests:
            self.open[request.id] = _Open(request, done)
            task = asyncio.create_task(play(request))
            self.playing.add(task)
            task.add_done_callback(self.playing.discard)

    async def turn(self, request: Request) -> Response:
        """Sample one turn of an open episode."""
        self.turns[request.id] = answer = asyncio.get_running_loop().create_future()
        self.asked.append(request)
        self.work.set()
        try:
            return await answer
        except asyncio.CancelledError:  # nobody waits for it any more
            self.turns.pop(request.id, None)
            self.thread.submit(self.sampler.abort, [request.id])
            raise

    async def _run_engine(self) -> None:
        try:
            while self.open:
                while not self.going.is_set():  # it may be cleared again before this task runs
                    await self.going.wait()
                groups, turns = await self._in_thread(self._step)
                self.progress.set()
                for group, queue in groups:
                    queue.put_nowait(group)
                for response in turns:
                    answer = self.turns.pop(response.id, None)
                    if answer is not None and not answer.done():
                        answer.set_result(response)
                self.work.clear()
                if self.open and not (self.sampler.busy or (self.asked and not self.parked)):
                    await self.work.wait()  # for an environment, or for weights
        except BaseException as error:
            for entry in list(self.open.values()):  # the engine's thread may be adding some
                entry.done.put_nowait(error)
            self.open.clear()
            self._end_episodes()

    def _end_episodes(self) -> None:
        for task in self.playing:
            task.cancel()
        for answer in self.turns.values():
            answer.cancel()
        self.work.set()

    def _step(self) -> tuple[list[tuple[Group, _Done]], list[Response]]:
        """Step the engine; return finished groups and turns of episodes."""
        self._begin_turns()
        whole: list[_Open] = []
        turns: list[Response] = []
        began, before = time.monotonic(), self.finished
        while True:
            for response in self.sampler.step():
                group_id, _, index = response.id.rpartition(":")
                if (entry := self.open.get(group_id)) is None:  # a turn, perhaps one that nobody waits for any more
                    turns.append(response)
                    continue
                entry.responses[int(index)] = response
                self.finished += 1
                if len(entry.responses) == entry.request.responses:
                    whole.append(self.open.pop(group_id))
            # Switching threads after each step would cost a small model a tenth of its time. Environments need the
            # event loop.
            heard = whole or turns or (self.watchers and self.finished > before)
            if heard or self.playing or self.calls > 1 or not self.sampler.busy:
                break
        self.busy_seconds += time.monotonic() - began
        return [(group_of(o.request, o.responses, self.tokenizer, self.rollout), o.done) for o in whole], turns

    def _begin_turns(self) -> None:
        while self.asked and not self.parked:
            request = self.asked.popleft()
            if request.id in self.turns:
                self.sampler.add(request)

    # -- new weights: prepare; take, or the learner's transfer; confirm; admit --------------------------------------

    async def prepare(self) -> None:
        """Make room for new weights; what is sampled with them is not handed over before `admit`.

        Synchronous training: the open groups are finished, and new ones wait. In flight: the engine stops between two
        steps.
        """
        self.accepted.clear()
        self.arrived.clear()
        self.failure = None
        if self.in_flight:
            if self.episodes is not None and self.episodes.options.new_weights == "park":
                await self._park()
            self.going.clear()
            await self._in_thread(self.sampler.settle)  # after a step that may be in progress
            self.stopped_at = time.monotonic()
            return
        async with self.admission:
            self.closed = True
        if self.pump is not None:
            await self.pump
        await self._in_thread(self.sampler.settle)
        self.stopped_at = time.monotonic()
        await self._in_thread(lambda: self.sampler.wake("weights"))

    async def _park(self) -> None:
        """Wait until the turns that the engine is sampling are done; no other begins before `admit`."""
        await self._in_thread(lambda: None)  # those of the last `admit` begin first
        self.parked = True
        await self._in_thread(lambda: None)  # after the step that may be adding some
        waiting = {request.id for request in self.asked}
        begun = [answer for name, answer in self.turns.items() if name not in waiting]
        if begun:
            await asyncio.wait(begun)

    async def take(self, bundle: WeightBundle) -> None:
        """Load weights from Ray's object store; damaged ones are not loaded, which the receipt shows."""
        await self._in_thread(lambda: self._take(bundle))

    def _take(self, bundle: WeightBundle) -> None:
        self.checksum, self.announced = bundle.received_checksum(), bundle.checksum
        if self.checksum == self.announced:  # otherwise it may contain anything
            self.sampler.load(bundle)
            self.version = bundle.version

    async def transfer(self, step: str, arguments: dict[str, Any], version: int) -> None:
        """Do a step of the transfer that the learner drives (`rlkit/learner/sender.py`)."""
        try:
            await self._in_thread(lambda: self._transfer(step, arguments, version))
        except Exception as error:  # the learner may get it only after the transfer, which now never ends
            self.failure = error
            self.arrived.set()
            raise
        if step == "finish_weight_update":
            self.arrived.set()

    async def arrival(self) -> None:
        """Return when the transfer is complete; raise what ended it."""
        await self.arrived.wait()
        if self.failure is not None:
            raise self.failure

    def _transfer(self, step: str, arguments: dict[str, Any], version: int) -> None:
        self.sampler.receive(step, version, **arguments)
        if step == "finish_weight_update":
            self.version, self.checksum, self.announced = version, self.sampler.received_checksum(), None

    async def confirm(self, canary: Canary) -> WeightReceipt:
        """Return a receipt for the weights. If they look right here, the engine continues before the pool judges it."""
        receipt = await self._in_thread(lambda: self._confirm(canary))
        if receipt.canary_logprobs.size and receipt.announced in (None, receipt.checksum):
            await self._go_on()
        return receipt

    def _confirm(self, canary: Canary) -> WeightReceipt:
        self.sampler.wake("kv_cache")
        loaded = self.sampler.loaded()
        # A partly written layer holds whatever was in memory before: nothing is computed with it.
        usable = loaded is None or not loaded.unwritten
        logprobs = self.sampler.prompt_logprobs(canary) if usable else np.empty(0, np.float32)
        now = time.monotonic()
        frozen, passed = now - self.stopped_at, now - self.receipt_at
        idle, self.busy_seconds, self.receipt_at = passed - self.busy_seconds - frozen, 0.0, now
        return WeightReceipt(self.version, self.checksum, self.announced, logprobs, loaded, idle, frozen)

    async def admit(self) -> None:
        """Hand over what is sampled and begin parked turns, as the receipt was accepted. Nobody waits for this call."""
        self.accepted.set()
        if self.parked:
            self.parked = False
            await self._in_thread(self._begin_turns)
            self.work.set()

    async def _go_on(self) -> None:
        self.going.set()
        async with self.admission:
            self.closed = False
            self.admission.notify_all()

    async def load_weights(self, bundle: WeightBundle, canary: Canary) -> WeightReceipt:
        """`prepare`, `take` and `confirm` in one call."""
        await self.prepare()
        await self.take(bundle)
        return await self.confirm(canary)

    async def sleep(self, level: int) -> None:
        """Free GPU memory until `prepare` and `confirm`, or `wake`. Only while nothing is being sampled.

        Level 1 keeps the weights in host memory; after level 2 new ones must be loaded.
        """
        await self._in_thread(lambda: self.sampler.sleep(level))
        self.open.clear()  # if a run ends in mid-step: vLLM dropped them, and the engine loop would wait forever
        self._end_episodes()

    async def wake(self) -> None:
        """Undo `sleep(1)`."""
        await self._in_thread(lambda: self.sampler.wake("weights"))
        await self._in_thread(lambda: self.sampler.wake("kv_cache"))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        self.calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        finally:
            self.calls -= 1
