"""The loop: collect, advantages, update, publish. It knows no particular algorithm, reward or data."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from algorithms.base import Advantages, Algorithm, Experience
from rlkit.checkpoint.checkpointer import Checkpointer
from rlkit.cluster.waiting import waiting
from rlkit.config.schema import RunConfig
from rlkit.evaluation import Evaluation, Evaluator
from rlkit.experience import Group
from rlkit.experience.scores import check_failures
from rlkit.learner.joint import JointLearner
from rlkit.metrics import HackingAlarm, UpdateGuard, rollout_metrics, summary
from rlkit.producer import Producer, until
from rlkit.rollout.pool import RolloutPool
from rlkit.serving.pool import RewardPool
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker
from rlkit.weight_sync import WeightSync


@dataclass
class Trainer:
    """All parts are started; `fit` trains and returns the summary."""

    config: RunConfig
    algorithm: Algorithm
    rollout: RolloutPool
    learner: JointLearner
    reward: RewardPool
    buffer: Any
    producer: Producer
    evaluator: Evaluator | None
    weight_sync: WeightSync
    folder: RunFolder
    tracker: Tracker
    guard: UpdateGuard
    alarm: HackingAlarm
    checkpointer: Checkpointer
    began: float
    """`time.monotonic()` at the start of the run."""
    version: int = 0
    failed_scores: int = 0
    accuracies: dict[int, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)

    async def fit(self) -> dict[str, Any]:
        """Train to the last step.

        Raises TrainingFailedError, WaitedTooLongError, RewardFailed, and what actors raise.
        """
        trainer = self.config.trainer
        # Proves that sampler and learner hold the same policy before any training.
        async with self.deadline("the driver", "the first weights to be published"):
            await self.publish()
        if not self.version:
            await self.evaluate(0)
        producing, watching = asyncio.create_task(self.producer.run()), asyncio.create_task(self.learner.watch())
        training_began, first = time.monotonic(), self.version + 1
        try:
            for step in range(first, trainer.total_steps + 1):
                self.checkpointer.check()
                async with self.deadline(f"step {step}", "groups, update and new weights"):
                    await until(self.step(step, producing), watching)
                last = step == trainer.total_steps
                if last or (trainer.evaluate_every_steps and step % trainer.evaluate_every_steps == 0):
                    await until(self.evaluate(step), watching)
                if last or (trainer.save_every_steps and step % trainer.save_every_steps == 0):
                    await self.save(step)
            async with self.deadline("the driver", "the last checkpoint to be sealed"):
                await self.checkpointer.finish()
        finally:
            for task in (producing, watching):
                task.cancel()
            async with self.deadline("the end of the training", "the producer to stop and the checkpoint to be sealed"):
                await asyncio.gather(producing, watching, self.checkpointer.finish(), return_exceptions=True)
        return summary(
            steps=trainer.total_steps,
            accuracies=self.accuracies,
            wall_seconds=time.monotonic() - self.began,
            seconds_per_step=(time.monotonic() - training_began) / (trainer.total_steps + 1 - first),
            reward_failed=self.failed_scores,
            policy=self.folder.policy(trainer.total_steps),
        )

    async def step(self, step: int, producing: asyncio.Task[None]) -> None:
        if step > 1:
            await self.buffer.advance.remote(step - 1)  # now there is room for this step's groups
        groups, times = await self.collect(producing)
        report, sampling = self.producer.take_report()
        self.failed_scores += report.failed
        check_failures(report, self.reward.config.max_failed_share, f"reward {self.reward.target}")
        await self.weight_sync.release_sampler()
        groups, of_reward = await self.reward.learn(groups, "before")
        with self.tracker.timed("advantages"):
            experience = await self.learner.experience(groups, step)
            advantages = self.algorithm.advantages(experience)
            advantages.check(experience, self.algorithm)
        with self.tracker.timed("update"):
            metrics, judged, (_, learnt) = await asyncio.gather(
                self.update(experience, advantages), self.judge(groups), self.reward.learn(groups, "after")
            )
        difference = await self.publish()
        stats = await self.buffer.stats.remote()
        metrics |= {**of_reward, **learnt, **advantages.metrics, **times}
        metrics |= {
            **rollout_metrics(groups, report, judged, stats, sampling),
            "weights/version": float(self.version),
            "weights/canary_difference": difference,
        }
        self.algorithm.observe(metrics)
        self.alarm.check(metrics)
        self.latest |= metrics
        self.tracker.step(step, metrics, groups, advantages.tokens)

    async def collect(self, producing: asyncio.Task[None]) -> tuple[list[Group], dict[str, float]]:
        """The next groups from the buffer; seconds of sampling, and of scoring beyond it."""
        began = time.monotonic()
        with self.tracker.timed("generate"):
            groups = await until(self.buffer.take.remote(), producing)
        ended, sampled = time.monotonic(), self.producer.generation_end() or began
        sampled = min(max(sampled, began), ended)
        return groups, {"time/generate": sampled - began, "time/score": ended - sampled}

    async def update(self, experience: Experience, advantages: Advantages) -> dict[str, float]:
        """Update policy and critic: version + 1. Raises TrainingFailedError when updates keep failing."""
        metrics = await self.learner.update(experience, advantages)
        self.version += 1
        self.guard.check(metrics)
        return metrics

    async def judge(self, groups: list[Group]) -> list[Group] | None:
        """The step's groups as the verifier scores them: shows when a learned reward is being gamed."""
        return None if self.evaluator is None else (await self.evaluator.judge([groups]))[0]

    async def publish(self) -> float:
        """Send the weights to every rollout worker and verify them; return the canary's difference in log-probs."""
        with self.tracker.timed("publish"):
            return await self.weight_sync.publish(self.version)

    async def evaluate(self, step: int) -> None:
        if self.evaluator is None:
            return
        with self.tracker.timed("evaluate"):
            async with self.deadline("the driver", f"the held-out evaluation after step {step}"):
                result: Evaluation = await self.evaluator.evaluate(step)
        self.accuracies[step] = result.accuracy
        self.latest |= {**result.metrics, "accuracy/heldout": result.accuracy}
        self.tracker.evaluation(step, result.accuracy, result.metrics)

    async def save(self, step: int) -> None:
        """Write `checkpoints/step_NNNNNN`: the policy as a Hugging Face folder, and all that resuming needs."""
        with self.tracker.timed("save"):
            async with self.deadline("the driver", f"the checkpoint of step {step}"):
                await self.weight_sync.with_learner_memory(self.checkpointer.save(step, self, self.latest))

    def deadline(self, who: str, what: str) -> AbstractAsyncContextManager[None]:
        """Time limit of one step, evaluation or checkpoint."""
        return waiting(who, what, self.config.trainer.step_timeout_seconds, "trainer.step_timeout_seconds")

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "failed_scores": self.failed_scores,
            "accuracies": {str(step): accuracy for step, accuracy in self.accuracies.items()},
            "algorithm": self.algorithm.state_dict(),
            "skipped_updates": self.guard.skipped_in_a_row,
            "alarm": list(self.alarm.history),
            "latest": self.latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version, self.failed_scores = state["version"], state["failed_scores"]
        self.accuracies = {int(step): accuracy for step, accuracy in state["accuracies"].items()}
        self.algorithm.load_state_dict(state["algorithm"])
        self.guard.skipped_in_a_row = state["skipped_updates"]
        self.alarm.history.extend(state["alarm"])
        self.latest = state["latest"]
