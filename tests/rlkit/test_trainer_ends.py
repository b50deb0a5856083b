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
from rlkit.evaluation import Evaluation
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score
from rlkit.experience.buffer import DataSolvedError
from rlkit.experience.filters import BufferConfig
from rlkit.experience.scores import ScoreReport
from rlkit.experience.waiting_buffer import WaitingBuffer
from rlkit.producer import Producer
from rlkit.rollout.pool import RolloutFailedError
from rlkit.rollout.requests import GroupRequest
from rlkit.saving import SaveSchedule, Stop, StoppedError
from rlkit.serving.unasked import NoReward
from rlkit.tracking.run_folder import RunFolder
from rlkit.trainer import Trainer

PROMPTS = [Prompt(f"p{i}", (Message("user", "?"),), (1, i)) for i in range(4)]


def group_of(request: GroupRequest) -> Group:
    sample = Sample(0, np.array([5], np.int32), np.array([-1.0], np.float32), "", "stop", (1, 1), seed=0)
    return Group(request.id, request.prompt, (sample,), step=request.step).with_scores(GroupScores((Score(1.0),)))


class SlowBuffer(WaitingBuffer):
    """`taken` is called when the groups of a step have left it and not yet arrived; None: they arrive at once."""

    def __init__(self, taken: Callable[[], None] | None) -> None:
        super().__init__(2, 0, BufferConfig())
        self.taken = taken

    async def take(self) -> list[Group]:
        groups = await super().take()
        if self.taken is not None:
            self.taken()
            await asyncio.sleep(60)
        return groups


class Run:
    """A run of two groups per step that has finished step 1; `taken` is called while step 2's groups are on their way
    from the buffer."""

    def __init__(
        self, tmp_path: Path, taken: Callable[[], None] | None, *options: str, failing: Exception | None = None
    ) -> None:
        config = load_config(["reward=rule", f"run_dir={tmp_path}", "trainer.total_steps=3", *options]).config
        self.buffer, self.failing = SlowBuffer(taken), failing
        self.buffer.load_state_dict({"ready": [], "version": 0, "taken_step": 1, "rejected": {}})
        asked = PromptOrder(PROMPTS, 0)
        asked.take(2)
        self.producer = Producer(
            asked, self, self, self.buffer, most_at_once=2, waits_for_places=False, samples_per_prompt=1,  # type: ignore[arg-type]
            greedy=False, seed=0, step_timeout_seconds=config.trainer.step_timeout_seconds,
        )  # fmt: skip
        self.producer.started = 2
        self.saved: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        self.said: list[str] = []
        self.lost: Exception | None = None
        self.saved_before = False
        """Whether it began with step 1's checkpoint."""
        self.asleep = False
        """Whether engines could sample, where they share their GPU with the learner."""
        tracker = SimpleNamespace(
            warn=self.said.append, message=self.said.append, timed=lambda _: _nothing(), evaluation=lambda *_: None
        )
        task = asyncio.current_task()
        assert task is not None
        parts: dict[str, Any] = dict.fromkeys(("algorithm", "reward", "guard", "diagnostics", "evaluator", "recorder"))
        parts |= {"learner": self, "weight_sync": self, "checkpointer": self}
        self.trainer = Trainer(
            config=config,
            buffer=self.buffer,
            producer=self.producer,
            folder=RunFolder(tmp_path),
            tracker=tracker,  # type: ignore[arg-type]
            began=0.0,
            schedule=SaveSchedule(config.trainer),
            stop=Stop(task),
            version=1,
            **parts,
        )

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[list[Group]]:
        if self.lost is None and not self.saved_before:
            self.trainer.schedule.saved = None
        if self.failing is not None:
            raise self.failing
        yield [group_of(request) for request in requests]

    async def score(self, batches: list[Any]) -> Any:
        scores = [group.scores for groups in batches for group in groups]
        return SimpleNamespace(report=ScoreReport(), scores=scores)

    async def publish(self, version: int) -> dict[str, float]:
        return {}

    async def experience(self, groups: list[Group], step: int) -> Any:
        return SimpleNamespace(groups=groups)

    async def update(self, *_: Any) -> dict[str, float]:
        return {}

    @property
    def policy(self) -> Any:
        return SimpleNamespace(signals=None)

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def release_sampler(self) -> None:
        self.asleep = True

    async def with_learner_memory(self, work: Awaitable[None]) -> None:
        self.asleep = True
        await work
        self.asleep = False

    async def evaluate(self, step: int) -> Evaluation:
        assert not self.asleep, "asked of an engine that sleeps, which would never answer"
        return Evaluation("accuracy/heldout", {"accuracy/heldout": 1.0})

    async def save(self, step: int, run: Any, metrics: Any) -> None:
        self.saved.append((step, self.producer.state_dict(), self.buffer.state_dict()))

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


@pytest.mark.parametrize("checkpoint", ["before", "none"])
def test_solved_data_are_saved_and_then_evaluated(checkpoint: str, tmp_path: Path) -> None:
    async def run() -> tuple[Run, dict[str, Any]]:
        run = Run(tmp_path, None, failing=DataSolvedError("the data are solved"))
        run.saved_before = checkpoint == "before"
        run.trainer.evaluator = run  # type: ignore[assignment]
        run.trainer.diagnostics = SimpleNamespace(conclude=lambda _: {})  # type: ignore[assignment]
        return run, await run.trainer.fit()

    ended, summary = asyncio.run(run())
    assert (summary["ended"], summary["accuracy_after"]) == ("the data are solved", 1.0)
    assert [step for step, *_ in ended.saved] == [1] * (1 if checkpoint == "before" else 2), (
        "its manifest names the best"
    )
    for _, producer, buffer in ended.saved:
        assert (buffer["taken_step"], buffer["version"]) == (1, 0), "a resumed run begins with the step after"
        assert [entry["id"] for entry in producer["open"]] == ["00000002", "00000003"]


@pytest.mark.parametrize("total", [1, 3])
def test_an_evaluation_that_did_not_end_is_made_up_for(total: int, tmp_path: Path) -> None:
    """Its step was saved when the judge failed, or a signal came; also if it was the last step."""

    async def run() -> tuple[Run, dict[str, Any] | None]:
        options = [f"trainer.total_steps={total}", "trainer.evaluate_every_steps=1"]
        run = Run(tmp_path, None, *options, failing=RolloutFailedError("rollout worker 0 died again"))
        run.saved_before = True
        run.trainer.evaluator = run  # type: ignore[assignment]
        run.trainer.diagnostics = SimpleNamespace(conclude=lambda _: {})  # type: ignore[assignment]
        if total == 1:
            return run, await run.trainer.fit()
        with pytest.raises(RolloutFailedError):
            await run.trainer.fit()
        return run, None

    resumed, summary = asyncio.run(run())
    assert resumed.trainer.heldout == {1: 1.0}
    assert [step for step, *_ in resumed.saved] == [1], "its manifest names the best"
    assert summary is None or summary["accuracy_after"] == 1.0


def test_a_disk_that_does_not_take_the_records_ends_the_run_at_the_deadline(tmp_path: Path) -> None:
    async def run() -> None:
        run, hung = Run(tmp_path, lambda: None, "trainer.step_timeout_seconds=1"), threading.Event()
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


@pytest.mark.parametrize(("pause", "asked_for"), [("", 6), ("save", 4), ("evaluate", 4)])
def test_engines_have_the_next_steps_requests_when_the_weights_come(pause: str, asked_for: int, tmp_path: Path) -> None:
    """Not before a checkpoint or an evaluation, which are of a whole step."""
    started: list[int] = []

    async def publish(version: int) -> dict[str, float]:
        await asyncio.sleep(0.05)  # the producer has its turn
        started.append(run.producer.started)
        return {}

    async def nothing_found(record: Any) -> dict[str, float]:
        return {}

    async def step() -> None:
        nonlocal run
        run = Run(tmp_path, None, f"trainer.{pause}_every_steps=2" if pause else "trainer.evaluate_every_steps=0")
        trainer, nothing = run.trainer, SimpleNamespace(check=lambda *_: None, metrics={})
        trainer.algorithm = SimpleNamespace(advantages=lambda _: nothing, observe=lambda _: None)  # type: ignore[assignment]
        trainer.reward, trainer.guard = NoReward(), nothing  # type: ignore[assignment]
        trainer.weight_sync.publish = publish  # type: ignore[method-assign]
        trainer.diagnostics = SimpleNamespace(check=nothing_found, obey=lambda: None)  # type: ignore[assignment]
        trainer.recorder = SimpleNamespace(step=lambda *_: None)  # type: ignore[assignment]
        trainer.tracker.step = lambda *_: None  # type: ignore[method-assign]
        producing, for_ever = (asyncio.create_task(work) for work in (run.producer.run(), run.watch()))
        try:
            await asyncio.wait_for(trainer.step(2, producing, for_ever), 20)
        finally:
            producing.cancel()
            for_ever.cancel()

    run: Any = None
    asyncio.run(step())
    assert started == [asked_for]
    assert run.trainer.advanced == (asked_for == 6)
