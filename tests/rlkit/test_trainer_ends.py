"""What is saved when a run ends in the middle of a step: the real loop, producer and buffer without Ray."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlkit.cluster.waiting import WaitedTooLongError
from rlkit.config.loading import load_config
from rlkit.data.order import PromptOrder
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score
from rlkit.experience.buffer_actor import BufferActor
from rlkit.experience.filters import BufferConfig
from rlkit.experience.scores import ScoreReport
from rlkit.producer import Producer
from rlkit.rollout.pool import RolloutFailedError
from rlkit.rollout.requests import GroupRequest
from rlkit.saving import SaveSchedule, Stop, StoppedError
from rlkit.tracking.run_folder import RunFolder
from rlkit.trainer import Trainer

PROMPTS = [Prompt(f"p{i}", (Message("user", "?"),), (1, i)) for i in range(4)]


def group_of(request: GroupRequest) -> Group:
    sample = Sample(0, np.array([5], np.int32), np.array([-1.0], np.float32), "", "stop", (1, 1), seed=0)
    return Group(request.id, request.prompt, (sample,), step=request.step).with_scores(GroupScores((Score(1.0),)))


class Called:
    """An actor's method, called here."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


class Run:
    """A run of two groups per step that has finished step 1; `taken` is called while step 2's groups are on their way
    from the buffer."""

    def __init__(
        self, tmp_path: Path, taken: Callable[[], None], failing: Exception | None = None, step_seconds: float = 60.0
    ) -> None:
        trainer = ["trainer.total_steps=3", f"trainer.step_timeout_seconds={step_seconds}"]
        config = load_config(["reward=rule", f"run_dir={tmp_path}", *trainer]).config
        self.actor, self.taken, self.failing = BufferActor(2, 0, BufferConfig()), taken, failing
        state = {"ready": [], "version": 0, "taken_step": 1, "rejected": {}}
        self.actor.buffer.load_state_dict(state)
        names = ("reserve", "add", "advance", "put_back")
        buffer: Any = SimpleNamespace(**{name: Called(getattr(self.actor, name)) for name in names})
        buffer.take = Called(self.take)
        asked = PromptOrder(PROMPTS, 0)
        asked.take(2)
        self.producer = Producer(
            asked, self, self, buffer, most_at_once=2, waits_for_places=False, samples_per_prompt=1,  # type: ignore[arg-type]
            greedy=False, seed=0, step_timeout_seconds=step_seconds,
        )  # fmt: skip
        self.producer.started = 2
        self.saved: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        self.said: list[str] = []
        self.lost: Exception | None = None
        tracker = SimpleNamespace(warn=self.said.append, message=self.said.append, timed=lambda _: _nothing())
        task = asyncio.current_task()
        assert task is not None
        parts: dict[str, Any] = dict.fromkeys(("algorithm", "reward", "guard", "diagnostics", "evaluator", "recorder"))
        parts |= {"learner": self, "weight_sync": self, "checkpointer": self}
        self.trainer = Trainer(
            config=config,
            buffer=buffer,
            producer=self.producer,
            folder=RunFolder(tmp_path),
            tracker=tracker,  # type: ignore[arg-type]
            began=0.0,
            schedule=SaveSchedule(config.trainer),
            stop=Stop(task),
            version=1,
            **parts,
        )

    async def take(self) -> list[Group]:
        groups = await self.actor.take()
        self.taken()
        await asyncio.sleep(60)  # a large step takes its time
        return groups

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[list[Group]]:
        if self.lost is None:
            self.trainer.schedule.saved = None  # as if it had not begun with this step's checkpoint
        if self.failing is not None:
            raise self.failing
        yield [group_of(request) for request in requests]

    async def score(self, batches: list[Any]) -> Any:
        return SimpleNamespace(report=ScoreReport(), batches=batches)

    async def publish(self, version: int) -> dict[str, float]:
        return {}

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def release_sampler(self) -> None: ...

    async def save(self, step: int, run: Any, metrics: Any) -> None:
        self.saved.append((step, self.producer.state_dict(), await self.actor.state_dict()))

    def check(self) -> None: ...

    async def finish(self) -> None:
        lost, self.lost = self.lost, None
        if lost is not None:
            raise lost


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_groups_on_their_way_from_the_buffer_are_asked_for_again(tmp_path: Path) -> None:
    async def run() -> Run:
        run = Run(tmp_path, lambda: run.trainer.stop.on(signal.SIGTERM))
        with pytest.raises(StoppedError):
            await run.trainer.fit()
        return run

    ((step, producer, buffer),) = asyncio.run(run()).saved
    assert step == 1
    assert [entry["id"] for entry in producer["open"]] == ["00000002", "00000003"]
    assert (buffer["taken_step"], buffer["version"], buffer["ready"]) == (1, 0, [])  # else a resumed run has no room


def test_the_work_is_saved_when_the_sampler_is_given_up(tmp_path: Path) -> None:
    async def run() -> Run:
        run = Run(tmp_path, lambda: None, failing=RolloutFailedError("rollout worker 0 died again"))
        with pytest.raises(RolloutFailedError):
            await run.trainer.fit()
        return run

    assert [step for step, *_ in asyncio.run(run()).saved] == [1]


def test_a_disk_that_does_not_take_the_records_ends_the_run_at_the_deadline(tmp_path: Path) -> None:
    async def run() -> None:
        run, hung = Run(tmp_path, lambda: None, step_seconds=1.0), threading.Event()
        for what in ("step 0", "step 1"):
            run.trainer.folder.writer.put(what, hung.wait)
        with pytest.raises(WaitedTooLongError, match=rf"=1 s for step 0, step 1 to be written in {tmp_path}"):
            await run.trainer.fit()
        hung.set()

    asyncio.run(run())


def test_a_checkpoint_that_is_lost_while_the_run_is_stopped_is_said_and_made_again(tmp_path: Path) -> None:
    async def run() -> Run:
        run = Run(tmp_path, lambda: run.trainer.stop.on(signal.SIGTERM))
        run.lost = OSError("No space left on device")
        with pytest.raises(StoppedError):
            await run.trainer.fit()
        return run

    ended = asyncio.run(run())
    assert "the checkpoint of step 1 was lost: No space left on device" in ended.said
    assert [step for step, *_ in ended.saved] == [1]
