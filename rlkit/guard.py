"""What makes a run stop or warn: updates that are not finite, a sampler that drifts from the learner, dead waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from rlkit.config.schema import TrainerConfig
from rlkit.experience.buffer import BufferStats

T = TypeVar("T")


class TrainingFailedError(RuntimeError):
    """The run cannot go on; the message says why and what was waited for."""


class UpdateGuard:
    """Looks at the metrics of every update."""

    def __init__(self, config: TrainerConfig, warn: Callable[[str], None]) -> None:
        self.config, self.warn = config, warn
        self.skipped_in_a_row = 0

    def check(self, metrics: Mapping[str, float]) -> None:
        """Warn, or raise TrainingFailedError after `trainer.max_skipped_updates` skipped updates in a row."""
        mismatch = metrics.get("mismatch/logprob_mean", 0.0)
        if not mismatch <= self.config.mismatch_alarm:  # also true for NaN
            self.warn(
                f"sampler and learner disagree by {mismatch:.3g} in log-prob on average, more than "
                f"trainer.mismatch_alarm={self.config.mismatch_alarm:g}: other precision or kernels, top_p/top_k "
                "sampling, or stale weights"
            )
        if not metrics["policy/trained_samples"] and not metrics.get("policy/waits"):
            self.warn("a step had nothing to train on: no group had two valid samples")
        skipped = [name for name in ("policy", "critic") if metrics.get(f"{name}/skipped_updates")]
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.warn(f"an update of the {' and of the '.join(skipped)} was skipped: its loss or gradient was not finite")
        if self.skipped_in_a_row >= self.config.max_skipped_updates:
            raise TrainingFailedError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient, the last one of the "
                f"{' and of the '.join(skipped)} (trainer.max_skipped_updates): lower learner.learning_rate (or "
                "critic.learning_rate), or look at the rewards in samples.jsonl"
            )


async def within(seconds: float, what: str, work: Awaitable[T]) -> T:
    """What `work` gives. Raises TrainingFailedError, naming `what`, if that takes longer than a step may."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise TrainingFailedError(f"{what} took more than trainer.step_timeout_seconds={seconds:g}") from None


def waited_for(step: int, deadline: float, version: int, buffer: BufferStats, workers: Sequence[object]) -> str:
    """Who a step that took too long was waiting for, in one message."""
    return (
        f"step {step} took more than trainer.step_timeout_seconds={deadline:g}. Policy version {version}; "
        f"buffer: {buffer.ready} groups ready, {buffer.in_flight} in flight, rejected {dict(buffer.rejected)}; "
        f"reward workers: {workers}"
    )
