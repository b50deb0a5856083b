"""A run from a valid configuration to its summary: start the actors, train, end everything that was started."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from rewards.base import RewardContext
from rlkit.checkpoint.checkpointer import Checkpointer
from rlkit.checkpoint.resume import ResumePoint
from rlkit.cluster.placement import (
    Placement,
    beside_driver,
    loads_after,
    plan_bundles,
    released,
    reserve,
    start_in_order,
)
from rlkit.cluster.ray_session import ray_session
from rlkit.cluster.waiting import blocking, waiting
from rlkit.config.command import print_error
from rlkit.config.parts import ResolvedRun, config_text, plain
from rlkit.config.plan import asks_reward, gpu_shares, references_are_cached, sampled_path
from rlkit.config.schema import RunConfig
from rlkit.config.store import object_store_bytes
from rlkit.data.order import order_of
from rlkit.diagnostics.group import Diagnostics, make_diagnostics
from rlkit.evaluation import Evaluator
from rlkit.experience import UserError
from rlkit.experience.buffer import with_surplus
from rlkit.experience.filters import make_filter
from rlkit.experience.waiting_buffer import WaitingBuffer
from rlkit.metrics import UpdateGuard
from rlkit.models.folder import model_folder
from rlkit.models.usable import known_run
from rlkit.offline import NoSync, RecordedEvaluator, RecordedResponses, recorded_groups
from rlkit.producer import Producer
from rlkit.prompts import Loaded, canary, load_prompts, with_epochs
from rlkit.rollout.pool import RolloutPool
from rlkit.saving import SaveSchedule, Stop
from rlkit.serving.pool import RewardPool
from rlkit.serving.unasked import NoReward, Rewards
from rlkit.supervision import supervised
from rlkit.tracking.recorder import Recorder
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker
from rlkit.trainer import Trainer
from rlkit.weight_sync import WeightSync

T = TypeVar("T")
READING = "reading data, starting Ray"
LOADING = {
    "sampler": "loading the sampler (vLLM)",
    "learner": "loading the learner (DeepSpeed)",
    "reward": "loading the reward",
    "verifier": "loading the verifier",
    "critic": "loading the critic (DeepSpeed)",
}
"""Start-up phases as shown on the screen."""
END_SECONDS = 120.0
"""Time limit for actors, threads and Ray to end; after it the process exits, and the janitor ends the rest."""
ROOM_SECONDS = 60.0
"""Time limit for Ray to find room for the actors: nodes of a starting cluster may still be joining."""


def run(resolved: ResolvedRun, point: ResumePoint | None = None) -> int:
    """Train, from the checkpoint `point` if there is one.

    Returns 0, or after a message 1 (an error), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    config = resolved.config
    try:
        folder = RunFolder(config.run_dir, resume=config.resume == "auto" or (point is not None and point.same_run))
    except UserError as error:
        return print_error(error)
    if point is None or not point.same_run:  # otherwise keep the old one until nothing can refuse the new one
        folder.write_config(config_text(config))
    first_step = 1 if point is None else point.checkpoint.step + 1
    return supervised(
        folder,
        lambda: Tracker(config.tracking, folder, config.trainer.total_steps, first_step=first_step),
        config.trainer.report_waits_after,
        resolved.warnings,
        lambda tracker, closing: _train(resolved, folder, tracker, point, closing),
    )


async def _train(
    resolved: ResolvedRun,
    folder: RunFolder,
    tracker: Tracker,
    point: ResumePoint | None,
    closing: contextlib.ExitStack,
) -> None:
    """`closing` is closed by the caller after the event loop is gone."""
    config, began = resolved.config, time.monotonic()
    # Ray replaces the handler of SIGTERM when it starts; ours ends everything in order.
    task = asyncio.current_task()
    assert task is not None
    tracker.phase(READING)
    reading = _beside(lambda: load_prompts(resolved, tracker))
    with contextlib.ExitStack() as session:
        try:
            with blocking("the start", "Ray", *_startup(config)):
                session.enter_context(ray_session(config.cluster, folder.logs / "ray", object_store_bytes(resolved)))
        except Exception:
            await reading  # errors in the data are reported first
            raise
        stop = Stop(task)
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: the caller handles them
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.on, number)
        try:
            await _fit(resolved, reading, folder, tracker, point, closing, began, stop)
        except asyncio.CancelledError:
            stop.check()  # raises StoppedError, which names the signal
            raise


async def _fit(
    resolved: ResolvedRun,
    reading: asyncio.Future[Loaded],
    folder: RunFolder,
    tracker: Tracker,
    point: ResumePoint | None,
    closing: contextlib.ExitStack,
    began: float,
    stop: Stop,
) -> None:
    """Start everything and train, once Ray is running."""
    asked = config_text(resolved.config)
    async with contextlib.AsyncExitStack() as stack:
        engines = _Engines(resolved, folder.logs, stack)
        try:
            # Load early only if engines are sure to be needed: a resumed run may have nothing left to do, and an
            # unknown architecture may be refused.
            if point is None and known_run(model_folder(resolved.config.model.path)) is not None:
                engines.load()
            async with waiting("the start", "the data to be read", *_startup(resolved.config)):
                data = await reading
            tracker.phase_done(READING)
            resolved = with_epochs(resolved, len(data.train))
            config = resolved.config
            tracker.total_steps(config.trainer.total_steps)
            if point is not None and (done := point.nothing_left(config.trainer.total_steps)):
                tracker.message(done)
                return
            await _try_architecture(config, tracker)
            trainer = await _start(resolved, folder, tracker, data, engines, stack, began, stop)
            if point is None:
                folder.keep_only({})
            else:
                await _go_on(trainer, point, tracker)
                folder.write_config(asked)
            summary = await trainer.fit()
            tracker.finish(summary)
        finally:
            closing.enter_context(blocking("the end of the run", "actors, threads and Ray", END_SECONDS, "END_SECONDS"))


def _beside(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run `work` in a thread that does not keep a process alive that is told to end."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # a waiting task can be cancelled, the thread cannot

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="reading", daemon=True).start()
    return asyncio.wrap_future(done)


async def _try_architecture(config: RunConfig, tracker: Tracker) -> None:
    """Refuse an unknown architecture before any actor starts; one in the table is tried while the learner loads."""
    folder = model_folder(config.model.path)
    if known_run(folder) is not None:
        return
    tracker.phase("trying the model's architecture")
    from rlkit.models.attention import PACKED_ATTENTION
    from rlkit.models.policy import find_attention

    attention = await asyncio.to_thread(find_attention, folder, trust_remote_code=config.model.trust_remote_code)
    if attention != PACKED_ATTENTION:
        tracker.warn("packed batches are not exact for this model: its sequences run row by row, which is slower")


async def _go_on(trainer: Trainer, point: ResumePoint, tracker: Tracker) -> None:
    tracker.phase(f"resuming from {point.checkpoint.path}")
    for notice in point.notices:
        tracker.warn(notice)
    async with waiting("the start", f"{point.checkpoint.path} to be restored", *_startup(trainer.config)):
        await trainer.checkpointer.restore(point.checkpoint, trainer)
    tracker.resume(trainer.version, trainer.headline, trainer.heldout)


class _Engines:
    """Placement of all actors, and the rollout workers, which load slowest and so start while the data are read."""

    def __init__(self, resolved: ResolvedRun, logs: Path, stack: contextlib.AsyncExitStack) -> None:
        self._resolved, self._logs, self._stack = resolved, logs, stack
        self._loading: asyncio.Task[None] | None = None

    @cached_property
    def placed(self) -> asyncio.Task[tuple[Placement, RolloutPool | None]]:
        return self._begun(self._place())

    async def _place(self) -> tuple[Placement, RolloutPool | None]:
        resolved = self._resolved
        config, algorithm = resolved.config, resolved.make_algorithm()
        bundles = plan_bundles(
            config,
            critic_ranks=config.critic.ranks if algorithm.needs().critic else 0,
            reward_workers=resolved.reward_config.workers if asks_reward(config.rollout, algorithm) else 0,
        )
        group = self._stack.enter_context(released(await reserve(config, bundles, ROOM_SECONDS)))
        placement = Placement(group, bundles)
        if not config.rollout.workers:
            return placement, None
        model = str(model_folder(sampled_path(config)))
        return placement, RolloutPool(config, model, self._logs, placement.of("rollout"))

    def load(self) -> asyncio.Task[None]:
        if self._loading is None:
            self._loading = self._begun(self._load())
        return self._loading

    async def _load(self) -> None:
        _, pool = await self.placed
        if pool is not None:
            await pool.start()

    def _begun(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(end)
        return task


async def _start(
    resolved: ResolvedRun,
    folder: RunFolder,
    tracker: Tracker,
    data: Loaded,
    engines: _Engines,
    stack: contextlib.AsyncExitStack,
    began: float,
    stop: Stop,
) -> Trainer:
    """Start all actors in parallel; those that share a GPU one after the other."""
    from rlkit.learner.joint import JointLearner

    config, algorithm = resolved.config, resolved.make_algorithm()
    needs, rollout = algorithm.needs(), config.rollout
    model_path, logs = str(model_folder(config.model.path)), folder.logs
    seconds = config.trainer.startup_timeout_seconds
    judged = asks_reward(rollout, algorithm)
    placement, pool = await engines.placed
    critic_path = model_path if config.critic.path is None else str(model_folder(config.critic.path))
    learner = JointLearner.create(config, algorithm, model_path, critic_path, logs, placement, data.render)
    starts: dict[str, Callable[[], Awaitable[Any]]] = {"learner": learner.policy.start}
    if pool is not None:
        starts["sampler"] = engines.load
    if learner.critic is not None:
        starts["critic"] = learner.critic.start
    reward: Rewards = NoReward()
    if judged:
        gpus = gpu_shares(config).rewards / resolved.reward_config.workers
        context = RewardContext(
            device=config.cluster.device if gpus else "cpu",
            gpus=gpus,
            seed=config.seed,
            threads=config.cluster.threads_per_actor,
        )
        reward = RewardPool(config.reward, context, seconds, logs, place=placement.of("reward"))
        stack.push_async_callback(reward.close)
        starts["reward"] = reward.start
    evaluator: Evaluator | RecordedEvaluator | None = None
    if data.heldout and pool is not None:
        if isinstance(reward, NoReward) or _differs_from_the_reward(resolved):
            verifier = RewardPool(config.verifier, RewardContext(threads=1), seconds, logs, "verifier", beside_driver)
            stack.push_async_callback(verifier.close)
            starts["verifier"] = verifier.start
        else:
            verifier = reward
        # buffer.truncated=mask removes scores that the verifier would give.
        seen = verifier is reward and config.buffer.truncated != "mask"
        evaluator = Evaluator(data.heldout, pool, verifier, config.evaluation, config.seed, seen)
    sync: WeightSync | NoSync = NoSync()
    if pool is not None and rollout.source != "model":
        sync = WeightSync(config, pool, learner, reward, canary(data.train))
    if rollout.source == "data" and isinstance(sync, WeightSync):
        assert isinstance(evaluator, Evaluator)
        evaluator = RecordedEvaluator(data.recorded, learner, algorithm, (evaluator, sync.publish))
        sync = NoSync()
    elif data.recorded:
        evaluator = RecordedEvaluator(data.recorded, learner, algorithm)
    trained = config.trainer
    buffer = WaitingBuffer(
        trained.prompts_per_step, trained.max_staleness, config.buffer, rollout.oversample, trained.total_steps
    )
    starting = start_in_order(starts, loads_after(config))
    await _all_ready({LOADING[name]: part for name, part in starting.items()}, tracker, config)
    if references_are_cached(rollout, algorithm):
        tracker.phase("log-probs of the reference policy")
        file = Path(config.learner.reference_cache or folder.path / "reference.safetensors").expanduser()
        await learner.use_references(file, Path(model_path), recorded_groups(chain(data.train, data.recorded)))
    return Trainer(
        config=config,
        algorithm=algorithm,
        learner=learner,
        reward=reward,
        buffer=buffer,
        producer=Producer(
            order_of(data.train, config.seed, resolved.source.weights()),
            RecordedResponses() if pool is None or rollout.source == "data" else pool,
            reward,
            buffer,
            most_at_once=with_surplus(config.trainer.prompts_per_step, config.rollout.oversample),
            waits_for_places=config.trainer.max_staleness > 0,
            samples_per_prompt=algorithm.config.samples_per_prompt,
            greedy=needs.greedy_response,
            seed=config.seed,
            step_timeout_seconds=config.trainer.step_timeout_seconds,
        ),
        evaluator=evaluator,
        weight_sync=sync,
        checkpointer=Checkpointer(config, folder),
        folder=folder,
        tracker=tracker,
        recorder=Recorder(config.tracking, folder, make_filter(config.buffer), data.pieces),
        guard=UpdateGuard(config.trainer, tracker.warn),
        diagnostics=Diagnostics(
            make_diagnostics(config.diagnostics, plain(config)),
            data.train,
            warn=tracker.warn,
            write_table=folder.append_table,
            score=reward.judge,
        ),
        schedule=SaveSchedule(config.trainer),
        stop=stop,
        began=began,
    )


def _differs_from_the_reward(resolved: ResolvedRun) -> bool:
    """Return whether the verifier differs from the reward: the reward's options must not change the verifier."""
    reward, verifier = resolved.reward_class, resolved.verifier_class
    return reward is not verifier or resolved.reward_config != resolved.verifier_config


def _startup(config: RunConfig) -> tuple[float, str]:
    return config.trainer.startup_timeout_seconds, "trainer.startup_timeout_seconds"


async def _all_ready(starting: dict[str, Any], tracker: Tracker, config: RunConfig) -> None:
    """Wait for all, showing which are still loading. Raises the first error, or WaitedTooLongError at the deadline."""

    async def one(name: str, work: Any) -> None:
        tracker.phase(name, parallel=True)
        await work
        tracker.phase_done(name)
        left.discard(name)

    left = set(starting)
    async with waiting("the start", lambda: ", ".join(sorted(left)), *_startup(config)):
        await asyncio.gather(*(one(name, work) for name, work in starting.items()))
