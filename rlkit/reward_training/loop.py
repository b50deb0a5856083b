"""The loop of all reward trainings: measure, step, measure at intervals, save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rlkit.data.base import BadRow
from rlkit.reward_training.base import Report

WARNED_ROWS = 10
"""Unusable rows that are named individually."""

FEW_STEPS = 10
"""Trainings with fewer steps give a warning."""

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Task(Generic[Batch]):
    batches: Iterator[Batch]
    """Endless batches."""
    step: Callable[[Batch], Mapping[str, float]]
    """Takes a step; returns metrics `area/name`."""
    measure: Callable[[], dict[str, float]]
    """Measures on the held-out rows."""
    save: Callable[[Path], None]
    """Saves the model; all ranks call it."""
    heldout: str = "heldout/{}"
    """Pattern for the names of the measures in metrics.jsonl."""


@dataclass(frozen=True)
class Course:
    steps: Sequence[Mapping[str, float]]
    """Metrics of every step."""
    before: dict[str, float]
    after: dict[str, float]


def train(task: Task[Batch], steps: int, evaluate_every: int, report: Report, folder: Path) -> Course:
    """Measure, take `steps` steps, measure after every `evaluate_every` of them (0: never) and at the end, then
    save."""
    before = after = task.measure()
    report.evaluation(0, **named(task.heldout, before))
    if steps < FEW_STEPS:
        report.warn(
            f"the training has only {steps} optimizer step{'s' * (steps > 1)}: hardly anything will be learnt. "
            "More rows, more epochs or smaller batches (the reward.* keys of this training) give more steps"
        )
    report.begins(steps)
    course = []
    for step, batch in zip(range(1, steps + 1), task.batches, strict=False):
        course.append(task.step(batch))
        report(step, **course[-1])
        if step == steps or (evaluate_every and step % evaluate_every == 0):
            after = task.measure()
            report.evaluation(step, **named(task.heldout, after))
    task.save(folder)
    return Course(course, before, after)


def named(pattern: str, values: Mapping[str, float]) -> dict[str, float]:
    return {pattern.format(name): value for name, value in values.items()}


def warn_of(bad: Sequence[BadRow], report: Report) -> None:
    for row in bad[:WARNED_ROWS]:
        report.warn(f"skipped {row.origin}: {row.reason}")
