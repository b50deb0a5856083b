"""The training loop: collect, advantages, update, publish. It depends on no particular algorithm, reward or data."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from algorithms.base import Advantages, Algorithm, Experience
from rlkit.checkpoint.checkpointer import Checkpointer
from rlkit.cluster.waiting import WaitedTooLongError, waiting
from rlkit.config.schema import RunConfig
from rlkit.diagnostics.base import StepRecord
from rlkit.diagnostics.group import DiagnosedError, Diagnostics
from rlkit.evaluation import Evaluation, Evaluator
from rlkit.experience import Group, UserError
from rlkit.experience.buffer import DataSolvedError, TooManyRejectedError
from rlkit.experience.filters import solved
from rlkit.experience.scores import RewardFailed, check_failures
from rlkit.experience.waiting_buffer import WaitingBuffer
from rlkit.metrics import UpdateGuard, rollout_metrics, summary
from rlkit.offline import NoSync, RecordedEvaluator
from rlkit.producer import Producer, until
from rlkit.rollout.pool import RolloutFailedError
from rlkit.saving import SaveSchedule, Stop, StoppedError
from rlkit.serving.unasked import Rewards
from rlkit.tracking.recorder import Recorder
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker
from rlkit.weight_sync import WeightSync

if TYPE_CHECKING:
    from rlkit.learner.joint import JointLearner  # torch comes with it


@dataclass
class Trainer:
    """Takes parts that are already started; `fit` trains and returns the summary."""

    config: RunConfig
    algorithm: Algorithm
    learner: JointLearner
    reward: Rewards
    buffer: WaitingBuffer
    producer: Producer
    evaluator: Evaluator | RecordedEvaluator | None
    weight_sync: WeightSync | NoSync
    folder: RunFolder
    tracker: Tracker
    recorder: Recorder
    guard: UpdateGuard
    diagnostics: Diagnostics
    checkpointer: Checkpointer
    began: float
    """`time.monotonic()` at the start of the run."""
    schedule: SaveSchedule
    stop: Stop
    version: int = 0
    whole: bool = True
    """Whether learner and reward are those of the last finished step: False from a step's first change to its end."""
    saving_fails: bool = False
    """True while a checkpoint is being written and after one has failed: what hung once is not waited for again."""
    advanced: bool = False
    """Whether the buffer has been told of this version, so that the next step has begun."""
    failed_scores: int = 0
    headline: str = "accuracy/heldout"
    """The metric that summarises a held-out evaluation."""
    heldout: dict[int, float] = field(default_factory=dict)
    """Step -> value of the headline."""
    latest: dict[str, float] = field(default_factory=dict)

    async def fit(self) -> dict[str, Any]:
        """Train to the last step, or until the filters find the data solved; return the summary.

        If the last step is complete, saves it before raising WaitedTooLongError, RewardFailed, RolloutFailedError,
        TooManyRejectedError, DiagnosedError or StoppedError. Also raises TrainingFailedError, and what actors raise.
        """
        # Proves before any training that sampler and learner hold the same policy.
        async with self.deadline("the driver", "the first weights to be published"):
            await self.publish()
        if not self.version:
            await self.diagnostics.begin()
            await self.evaluate(0)
        else:
            self.schedule.was_saved(self.version)
            if self.evaluates_after(self.version):
                await self.evaluate_late()
        background = [
            asyncio.create_task(work) for work in (self.producer.run(), self.learner.watch(), self.stop.asked())
        ]
        training_began, first, ended = time.monotonic(), self.version + 1, None
        try:
            await self.train(*background)
            await self.sealed()
        except DataSolvedError as solved:
            ended = str(solved)
        except (
            StoppedError, RewardFailed, RolloutFailedError, WaitedTooLongError, TooManyRejectedError, DiagnosedError
        ):  # fmt: skip
            await self.end_background(background)
            await self.save_what_is_whole()
            raise
        finally:
            await self.end_background(background)
        if ended is not None:
            self.tracker.message(ended)
            await self.save_what_is_whole()
            await self.evaluate_late()
        return self.summary(ended, time.monotonic() - training_began, self.version + 1 - first)

    async def train(
        self, producing: asyncio.Task[None], watching: asyncio.Task[None], stopping: asyncio.Task[Any]
    ) -> None:
        trainer = self.config.trainer
        self.stop.training = True
        for step in range(self.version + 1, trainer.total_steps + 1):
            self.checkpointer.check()
            async with self.deadline("the driver", self.folder.writer.unwritten):
                await self.folder.writer.caught_up()
            async with self.deadline(f"step {step}", "groups, update and new weights"):
                await until(self.step(step, producing, stopping), watching)
            if self.evaluates_after(step):
                await until(self.evaluate(step), watching, stopping)
            if not self.advanced and self.schedule.due(step):
                await self.save(step)
            if step < trainer.total_steps:
                self.stop.check()

    async def end_background(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        self.stop.training = False
        for task in tasks:
            task.cancel()
        async with self.deadline("the end of the training", "the producer to stop and the checkpoint to be sealed"):
            *_, failed = await asyncio.gather(*tasks, self.checkpointer.finish(), return_exceptions=True)
        if isinstance(failed, Exception):
            self.tracker.warn(f"the checkpoint of step {self.schedule.saved} was lost: {failed}")
            self.schedule.saved = None

    def summary(self, ended: str | None, training_seconds: float, steps: int) -> dict[str, Any]:
        best, missing = self.schedule.best, self.schedule.missing(self.latest)
        if missing and self.evaluator is not None:
            self.tracker.warn(missing)
        return summary(
            steps=self.version,
            headline=self.headline,
            heldout=self.heldout,
            wall_seconds=time.monotonic() - self.began,
            seconds_per_step=training_seconds / max(1, steps),
            reward_failed=self.failed_scores,
            policy=self.policy_of(self.version),
            best=None
            if best is None
            else {
                "metric": self.schedule.metric,
                "value": best.value,
                "step": best.step,
                "policy": self.policy_of(best.step),
            },
            ended=ended,
            diagnosed=self.diagnostics.conclude(self.latest),
        )

    def policy_of(self, step: int) -> str | None:
        """Return the folder of the policy after a step; None if it was not kept (or is in the resumed run's folder)."""
        folder = self.folder.policy(step)
        return self.config.model.path if step == 0 else str(folder) if folder.is_dir() else None

    async def step(self, step: int, producing: asyncio.Task[None], stopping: asyncio.Task[Any]) -> None:
        if step > 1 and not self.advanced:
            await self.begin(step)
        groups, times = await self.collect(producing, stopping)
        rejected, stored = self.buffer.take_rejected(), self.producer.stored
        report, sampling = self.producer.take_report()
        self.failed_scores += report.failed
        try:
            check_failures(report, self.reward.config.max_failed_share, f"reward {self.reward.target}")
        except UserError:
            self.recorder.failed(step, groups)
            raise
        self.whole = False
        await self.weight_sync.release_sampler()
        groups, of_reward = await self.reward.learn(groups, "before", stored)
        with self.tracker.timed("advantages"):
            experience = await self.learner.experience(groups, step)
            advantages = self.algorithm.advantages(experience)
            advantages.check(experience, self.algorithm)
        with self.tracker.timed("update"):
            metrics, judged, (_, learnt) = await asyncio.gather(
                self.update(experience, advantages),
                self.judge([*groups, *rejected]),
                self.reward.learn(groups, "after", stored),
            )
        self.producer.order.retire(solved([*groups, *rejected], self.config.buffer.retire_solved_share))
        of_data, stats, asked = self.producer.order.metrics(), self.buffer.stats(), time.monotonic()
        if not (self.evaluates_after(step) or self.schedule.due(step)):
            await self.begin(step + 1)  # so that engines have its requests, and sample as soon as the weights come
        of_sampler = await self.publish()
        self.producer.weights_came(asked)
        metrics |= {**of_reward, **learnt, **advantages.metrics, **times}
        metrics |= rollout_metrics(groups, rejected, report, judged, stats, sampling)
        metrics |= {"weights/version": float(self.version), **of_sampler, **of_data}
        self.algorithm.observe(metrics)
        record = StepRecord(step, metrics, groups, rejected, judged, advantages)
        metrics = await self.diagnostics.check(record)
        self.latest |= metrics
        self.tracker.step(step, metrics, experience.groups)
        self.recorder.step(experience, advantages, rejected, judged, self.learner.policy.signals)
        stored.forget([*groups, *rejected])
        self.whole = True
        self.diagnostics.obey()

    async def begin(self, step: int) -> None:
        """Make room for a step's groups, so that the producer requests them."""
        await self.buffer.advance(step - 1)
        self.advanced = True

    def evaluates_after(self, step: int) -> bool:
        trainer = self.config.trainer
        every = trainer.evaluate_every_steps
        return step == trainer.total_steps or bool(every and step % every == 0)

    async def collect(
        self, producing: asyncio.Task[None], stopping: asyncio.Task[Any]
    ) -> tuple[list[Group], dict[str, float]]:
        """Return the step's groups, and the seconds spent waiting for their samples and then for their scores."""
        began = time.monotonic()
        with self.tracker.timed("generate"):
            groups = await until(self.buffer.take(), producing, stopping)
        ended = time.monotonic()
        sampled = min(max(self.producer.sampled_at(groups[0].step) or began, began), ended)
        waited = {"time/generate": sampled - began, "time/score": ended - sampled, "time/learner_idle": ended - began}
        return groups, waited

    async def update(self, experience: Experience, advantages: Advantages) -> dict[str, float]:
        """Update policy and critic, and increment the version. Raises TrainingFailedError if updates keep failing."""
        metrics = await self.learner.update(experience, advantages)
        self.version += 1
        self.advanced = False
        self.guard.check(metrics)
        return metrics

    async def judge(self, groups: list[Group]) -> list[Group] | None:
        """Return the step's groups as scored by the verifier, which shows when a learned reward is being gamed."""
        return None if self.evaluator is None else await self.evaluator.judge_training(groups, self.producer.stored)

    async def publish(self) -> dict[str, float]:
        """Send the weights to every rollout worker and verify them."""
        with self.tracker.timed("publish"):
            return await self.weight_sync.publish(self.version)

    async def evaluate(self, step: int) -> None:
        if self.evaluator is None:
            return
        with self.tracker.timed("evaluate"):
            async with self.deadline("the driver", f"the held-out evaluation after step {step}"):
                result: Evaluation = await self.evaluator.evaluate(step)
        self.headline, self.heldout[step] = result.headline, result.value
        self.latest |= result.metrics
        self.tracker.evaluation(step, result.headline, result.metrics)
        self.schedule.evaluated(step, self.latest, result.headline)
        if step and (missing := self.schedule.missing(self.latest)):
            self.tracker.warn(missing)

    async def evaluate_late(self) -> None:
        """Evaluate the last step after its checkpoint, if its evaluation was not due before or did not finish."""
        if self.version not in self.heldout:
            await self.evaluate(self.version)
        if self.schedule.improved:
            await self.save(self.version)  # the same step again: its manifest now names the best
            await self.sealed()

    async def save(self, step: int) -> None:
        """Write `checkpoints/step_NNNNNN`: the policy as a Hugging Face folder, and all that resuming needs."""
        await self.weight_sync.with_learner_memory(self._save(step))

    async def _save(self, step: int) -> None:
        if self.advanced:  # the run ends: what has begun of the next step is requested again later
            self.producer.ask_again(self.buffer.put_back(), step + 1)
            self.advanced = False
        self.schedule.evaluated(step, self.latest)  # the best metric may be a step metric
        self.saving_fails = True
        with self.tracker.timed("save"):
            async with self.deadline("the driver", f"the checkpoint of step {step}"):
                await self.checkpointer.save(step, self, self.latest.get(self.schedule.metric))
        self.saving_fails = False
        self.schedule.was_saved(step)

    async def sealed(self) -> None:
        """Wait for the checkpoint saved last; raise its error if it failed."""
        async with self.deadline("the driver", "the last checkpoint to be sealed"):
            await self.checkpointer.finish()

    async def save_what_is_whole(self) -> None:
        """Save a run that ends early. A step that has changed nothing yet is requested again by a resumed run."""
        if not self.whole or self.saving_fails or self.version in (0, self.schedule.saved):
            return
        try:
            await self.save(self.version)
            await self.sealed()
        except Exception as error:  # may have the cause that ended the run, which must be reported
            self.tracker.warn(f"step {self.version} could not be saved: {type(error).__name__}: {error}")
            return
        self.tracker.message(f"saved after step {self.version}: {self.folder.policy(self.version).parent}")

    def deadline(self, who: str, what: str | Callable[[], str]) -> AbstractAsyncContextManager[None]:
        """Return a context manager with the time limit of one step, evaluation or checkpoint."""
        return waiting(who, what, self.config.trainer.step_timeout_seconds, "trainer.step_timeout_seconds")

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "failed_scores": self.failed_scores,
            "headline": self.headline,
            "accuracies": {str(step): value for step, value in self.heldout.items()},
            "algorithm": self.algorithm.state_dict(),
            **self.guard.state_dict(),
            "diagnostics": self.diagnostics.state_dict(),
            "latest": self.latest,
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version, self.failed_scores = state["version"], state["failed_scores"]
        self.headline = state.get("headline", self.headline)  # not in checkpoints of 0.3
        self.heldout = {int(step): value for step, value in state["accuracies"].items()}
        self.algorithm.load_state_dict(state["algorithm"])
        self.guard.load_state_dict(state)
        self.diagnostics.load_state_dict(state)
        self.latest = state["latest"]
        if "schedule" in state:  # not in checkpoints before 0.3
            self.schedule.load_state_dict(state["schedule"])
