"""One run from a valid configuration to its summary: start the actors, train, end everything that was started."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from algorithms.base import Algorithm, Render
from rewards.base import RewardContext
from rlkit.checkpoint.checkpointer import Checkpointer
from rlkit.checkpoint.resume import ResumePoint
from rlkit.cluster.placement import (
    NO_GPU,
    Placement,
    beside_driver,
    loads_after,
    plan_bundles,
    released,
    reserve,
    start_in_order,
)
from rlkit.cluster.ray_session import ray_session
from rlkit.cluster.waiting import Watchdog, blocking, waiting
from rlkit.config.command import FAILED, INTERRUPTED, print_error
from rlkit.config.memory import object_store_bytes
from rlkit.config.messages import ConfigError, named_as_set
from rlkit.config.parts import ResolvedRun, config_text
from rlkit.config.plan import gpu_shares
from rlkit.config.schema import RunConfig
from rlkit.data.base import BadRow, DataConfig, DataError, Problem, Split
from rlkit.data.order import PromptOrder
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.endings import ending
from rlkit.evaluation import OWN, Evaluator
from rlkit.experience import Prompt, UserError
from rlkit.metrics import HackingAlarm, NoSignal, UpdateGuard
from rlkit.models.folder import model_folder
from rlkit.models.packing import shared_prefix
from rlkit.models.usable import known_run
from rlkit.producer import Producer
from rlkit.rollout.pool import RolloutPool
from rlkit.saving import SaveSchedule, Stop, StoppedError
from rlkit.serving.pool import RewardPool
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker
from rlkit.trainer import Trainer
from rlkit.weight_sync import WeightSync
from rlkit.weights.publication import Canary

TERMINATED = 128 + signal.SIGTERM
LOADING = {
    "sampler": "loading the sampler (vLLM)",
    "learner": "loading the learner (DeepSpeed)",
    "reward": "loading the reward",
    "verifier": "loading the verifier",
    "critic": "loading the critic (DeepSpeed)",
}
"""Start-up phases as the screen shows them."""
CANARY_PROMPTS, CANARY_TOKENS = 4, 32
END_SECONDS = 120.0
"""Time limit for actors, threads and Ray to end; then the process exits, and the janitor ends the rest."""
ROOM_SECONDS = 60.0
"""Time limit for Ray to find room for the actors: on a starting cluster, nodes still join."""


def run(resolved: ResolvedRun, point: ResumePoint | None = None) -> int:
    """Train, from the checkpoint `point` if there is one.

    Returns 0, or after a message 1 (an error), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    config = resolved.config
    try:
        folder = RunFolder(config.run_dir, resume=config.resume == "auto" or (point is not None and point.same_run))
    except UserError as error:
        return print_error(error)
    folder.write_config(config_text(config))
    try:
        first_step = 1 if point is None else point.checkpoint.step + 1
        with Tracker(config.tracking, folder, config.trainer.total_steps, first_step=first_step) as tracker:
            for warning in resolved.warnings:
                tracker.warn(str(warning))
            with Watchdog(tracker.message, config.trainer.report_waits_after, folder.logs / "driver.log"):
                _run_to_the_end(resolved, folder, tracker, point)
    except (asyncio.CancelledError, KeyboardInterrupt) as stopped:  # SIGTERM, Ctrl-C
        print(ending(stopped, folder), file=sys.stderr)
        return INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else TERMINATED
    except Exception as error:
        with contextlib.suppress(OSError), (folder.logs / "driver.log").open("a") as file:  # the disk may be full
            traceback.print_exception(error, file=file)
        if isinstance(error, ConfigError):
            return print_error(error)
        print(ending(error, folder), file=sys.stderr)
        return FAILED
    return 0


def _run_to_the_end(resolved: ResolvedRun, folder: RunFolder, tracker: Tracker, point: ResumePoint | None) -> None:
    """Raise an actor's own error instead of Ray's report, whose message is the actor's whole stack."""
    from ray.exceptions import RayTaskError

    try:
        with contextlib.ExitStack() as closing:
            asyncio.run(_train(resolved, folder, tracker, point, closing))
    except StoppedError as stopped:
        if stopped.signal is signal.SIGINT:
            raise KeyboardInterrupt from None
        raise asyncio.CancelledError from None
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise


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
    tracker.phase("reading data")
    train, heldout, render = load_prompts(resolved, tracker)
    await _try_architecture(config, tracker)
    tracker.phase("starting Ray")
    with contextlib.ExitStack() as session:
        with blocking("the start", "Ray", *_startup(config)):
            session.enter_context(ray_session(config.cluster, folder.logs / "ray", object_store_bytes(resolved)))
        stop = Stop(task)
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: whoever runs us handles them
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.on, number)
        async with contextlib.AsyncExitStack() as stack:
            try:
                trainer = await _start(resolved, folder, tracker, train, heldout, render, stack, began, stop)
                if point is None:
                    folder.keep_only({})
                else:
                    await _go_on(trainer, point, tracker)
                summary = await trainer.fit()
                tracker.finish(summary)
            except asyncio.CancelledError:
                stop.check()  # by its name
                raise
            finally:
                closing.enter_context(
                    blocking("the end of the run", "actors, threads and Ray", END_SECONDS, "END_SECONDS")
                )


async def _try_architecture(config: RunConfig, tracker: Tracker) -> None:
    """Refuse an unknown architecture before anything starts; one in the table is tried while the learner loads."""
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
    tracker.phase(f"going on from {point.checkpoint.path}")
    for notice in point.notices:
        tracker.warn(notice)
    async with waiting("the start", f"{point.checkpoint.path} to be restored", *_startup(trainer.config)):
        await trainer.checkpointer.restore(point.checkpoint, trainer)
    tracker.resume(trainer.version, trainer.headline, trainer.heldout)


async def _start(
    resolved: ResolvedRun,
    folder: RunFolder,
    tracker: Tracker,
    train: Sequence[Prompt],
    heldout: Mapping[str, Sequence[Prompt]],
    render: Render,
    stack: contextlib.AsyncExitStack,
    began: float,
    stop: Stop,
) -> Trainer:
    """Start all actors side by side; those that share a GPU one after the other."""
    import ray

    from rlkit.experience.buffer_actor import BufferActor
    from rlkit.learner.joint import JointLearner

    config, algorithm = resolved.config, resolved.make_algorithm()
    model_path, logs = str(model_folder(config.model.path)), folder.logs
    seconds = config.trainer.startup_timeout_seconds
    gpus = gpu_shares(config).rewards / resolved.reward_config.workers
    context = RewardContext(
        device=config.cluster.device if gpus else "cpu",
        gpus=gpus,
        seed=config.seed,
        threads=config.cluster.threads_per_actor,
    )
    bundles = plan_bundles(
        config,
        critic_ranks=config.critic.ranks if algorithm.needs().critic else 0,
        reward_workers=resolved.reward_config.workers,
    )
    placement = Placement(stack.enter_context(released(await reserve(config, bundles, ROOM_SECONDS))), bundles)
    rollout = RolloutPool(config, model_path, logs, placement.of("rollout"))
    critic_path = model_path if config.critic.path is None else str(model_folder(config.critic.path))
    learner = JointLearner.create(config, algorithm, model_path, critic_path, logs, placement, render)
    reward = RewardPool(config.reward, context, seconds, logs, place=placement.of("reward"))
    stack.push_async_callback(reward.close)
    verifier = reward
    if _own_verifier(resolved) and heldout:
        verifier = RewardPool(config.verifier, RewardContext(threads=1), seconds, logs, "verifier", beside_driver)
        stack.push_async_callback(verifier.close)
    # A mask takes scores away that the verifier would give.
    judged = verifier is reward and config.buffer.truncated != "mask"
    buffer = ray.remote(num_cpus=0, runtime_env={"env_vars": NO_GPU}, **beside_driver(0))(BufferActor).remote(
        config.trainer.prompts_per_step, config.trainer.max_staleness, config.buffer
    )
    starts: dict[str, Callable[[], Awaitable[Any]]] = {
        "sampler": rollout.start,
        "learner": learner.policy.start,
        "reward": reward.start,
    }
    if verifier is not reward:
        starts["verifier"] = verifier.start
    if learner.critic is not None:
        starts["critic"] = learner.critic.start
    starting = start_in_order(starts, loads_after(config))
    await _all_ready({LOADING[name]: part for name, part in starting.items()}, tracker, config)
    return Trainer(
        config=config,
        algorithm=algorithm,
        rollout=rollout,
        learner=learner,
        reward=reward,
        buffer=buffer,
        producer=_producer(config, algorithm, train, rollout, reward, buffer),
        evaluator=Evaluator(heldout, rollout, verifier, config.evaluation, config.seed, judged) if heldout else None,
        weight_sync=WeightSync(config, rollout, learner, reward, _canary(train)),
        checkpointer=Checkpointer(config, folder),
        folder=folder,
        tracker=tracker,
        guard=UpdateGuard(config.trainer, tracker.warn),
        alarm=HackingAlarm(config.trainer.hacking_alarm_steps, tracker.warn),
        schedule=SaveSchedule(config.trainer),
        stop=stop,
        signal=NoSignal(tracker.warn),
        began=began,
    )


def _canary(train: Sequence[Prompt]) -> Canary:
    """Pieces of different prompts, from a little before they differ: long system prompts have equal beginnings, and a
    state that leaks from one sequence into the next shows only on several."""
    prompts = [prompt.token_ids for prompt in train[: 8 * CANARY_PROMPTS]]
    start = max(0, len(shared_prefix(list(dict.fromkeys(prompts)))) - CANARY_TOKENS // 2)
    pieces = dict.fromkeys(ids[start : start + CANARY_TOKENS] for ids in prompts)
    return tuple(ids for ids in pieces if len(ids) > 1)[:CANARY_PROMPTS]


def _own_verifier(resolved: ResolvedRun) -> bool:
    """Whether the verifier needs a worker pool of its own: options of the reward must not move the yardstick."""
    reward, verifier = resolved.reward_class, resolved.verifier_class
    return reward is not verifier or resolved.reward_config != resolved.verifier_config


def _producer(
    config: RunConfig,
    algorithm: Algorithm,
    train: Sequence[Prompt],
    rollout: RolloutPool,
    reward: RewardPool,
    buffer: Any,
) -> Producer:
    return Producer(
        PromptOrder(train, config.seed),
        rollout,
        reward,
        buffer,
        groups_per_step=config.trainer.prompts_per_step,
        samples_per_prompt=algorithm.config.samples_per_prompt,
        greedy=algorithm.needs().greedy_response,
        seed=config.seed,
        step_timeout_seconds=config.trainer.step_timeout_seconds,
    )


def _startup(config: RunConfig) -> tuple[float, str]:
    return config.trainer.startup_timeout_seconds, "trainer.startup_timeout_seconds"


async def _all_ready(starting: dict[str, Any], tracker: Tracker, config: RunConfig) -> None:
    """Wait for all, showing which still load. Raises the first error, or WaitedTooLongError at the deadline."""

    async def one(name: str, work: Any) -> None:
        tracker.phase(name, parallel=True)
        await work
        tracker.phase_done(name)
        left.discard(name)

    left = set(starting)
    async with waiting("the start", lambda: ", ".join(sorted(left)), *_startup(config)):
        await asyncio.gather(*(one(name, work) for name, work in starting.items()))


def load_prompts(resolved: ResolvedRun, tracker: Tracker) -> tuple[list[Prompt], dict[str, list[Prompt]], Render]:
    """Training prompts, by set those held-out ones that the verifier can judge (maybe none), and how more are rendered.
    Raises DataError."""
    from rlkit.data.rendering import load_tokenizer, render, renderer

    config = resolved.config
    tokenizer = load_tokenizer(model_folder(config.model.path), config.model.trust_remote_code)
    source = resolved.make_data_source()

    def rendered(problems: list[Problem], bad: list[BadRow], data: DataConfig, what: str) -> list[Prompt]:
        prompts, too_long = render(problems, tokenizer, config.rollout.max_prompt_tokens, config.model.chat_template)
        _report_bad_rows([*bad, *too_long], len(problems) + len(bad), data.max_bad_row_share, what, tracker)
        return prompts

    splits: tuple[Split, ...] = ("train", "heldout")
    loaded = {split: rendered(*source.load(split), resolved.data_config, split) for split in splits}
    further = {}
    for name, one in resolved.sets.items():
        key = f"evaluation.sets.{name}"
        try:
            further[name] = rendered(*one.source(one.config, config.seed).load_set(), one.config, key)
        except DataError as error:
            raise DataError(named_as_set(str(error), key)) from error
    if not loaded["train"]:
        raise DataError("the data source has no usable training problem")
    questions, per_step = len(loaded["train"]), config.trainer.prompts_per_step
    if questions < per_step:
        tracker.warn(
            f"{questions} training questions for {per_step} in a step (trainer.prompts_per_step): each is "
            f"asked {per_step / questions:.3g} times in every step"
        )
    judges = ((resolved.reward_class, resolved.reward_config), (resolved.verifier_class, resolved.verifier_config))
    for message in dict.fromkeys(text for cls, own in judges for text in cls.doubts(own, loaded["train"])):
        tracker.warn(message)
    heldout = _heldout(resolved, loaded["train"], {OWN: loaded["heldout"], **further}, tracker)
    return loaded["train"], heldout, renderer(tokenizer, config.model.chat_template)


def _heldout(
    resolved: ResolvedRun, train: Sequence[Prompt], sets: Mapping[str, Sequence[Prompt]], tracker: Tracker
) -> dict[str, list[Prompt]]:
    """Of each set what the verifier can judge, and as many as are asked for."""
    answer_needed = resolved.verifier_class.traits(resolved.verifier_config).answer
    trained = {prompt.token_ids for prompt in train} if resolved.sets else set()
    heldout = {}
    for name, prompts in sets.items():
        key = f"evaluation.sets.{name}"
        most = (resolved.sets[name].prompts if name else None) or resolved.config.trainer.evaluation_prompts
        judged = [prompt for prompt in prompts if not answer_needed or prompt.answer is not None][:most]
        if name and not judged:
            raise DataError(f"{key} has no problem with a gold answer, which the verifier needs (verifier=NAME)")
        if name and (known := sum(prompt.token_ids in trained for prompt in judged)):
            tracker.warn(f"{known} of the {len(judged)} problems of {key} are also trained on")
        if judged:
            heldout[name] = judged
    if OWN not in heldout:
        whole = "" if heldout else ": this run is not evaluated (verifier=NAME may judge without one)"
        tracker.warn(f"no held-out problem with a gold answer{whole}")
    return heldout


def _report_bad_rows(bad: Sequence[BadRow], rows: int, allowed_share: float, split: str, tracker: Tracker) -> None:
    if bad:
        refuse_too_many_bad_rows(bad, rows, allowed_share, f"{split} problems")
        first = "; ".join(f"{row.origin}: {row.reason}" for row in bad[:3])
        tracker.warn(f"{len(bad)} of {rows} {split} rows skipped: {first}")
