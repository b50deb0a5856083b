"""Training a discriminator in phases: the steps that `train_reward reward=polar` and the embedded models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rlkit.polar_training.learner import PolarLearner
from rlkit.polar_training.triplets import Triplet


@dataclass(frozen=True)
class Phase:
    """Some steps on batches of one kind."""

    batches: Iterator[list[Triplet]]
    steps: int


def train(learner: PolarLearner, phases: Sequence[Phase], done: Callable[[int, float], None]) -> list[float]:
    """Take all steps; `done(step, loss)` is called after each. Returns the loss before each step: ln 2 at the first.

    A discriminator whose head was trained before starts elsewhere.
    """
    losses: list[float] = []
    for phase in phases:
        for _ in range(phase.steps):
            losses.append(learner.step(next(phase.batches)))
            done(len(losses), losses[-1])
    return losses
