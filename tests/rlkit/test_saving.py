"""When a run is saved, which policy is the best, and what a signal does."""

from __future__ import annotations

import asyncio
import signal

import pytest

from rlkit.config.schema import TrainerConfig
from rlkit.saving import Best, SaveSchedule, Stop, StoppedError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def schedule(**options: object) -> tuple[SaveSchedule, Clock]:
    clock = Clock()
    return SaveSchedule(TrainerConfig.model_validate({"total_steps": 100, **options}), clock), clock


def test_minutes_steps_and_the_last_step_are_each_a_reason() -> None:
    plan, clock = schedule(save_every_steps=10)
    assert [step for step in range(1, 101) if plan.due(step)] == list(range(10, 101, 10))
    plan, clock = schedule()
    assert [step for step in range(1, 101) if plan.due(step)] == [100]
    clock.now = 30 * 60
    assert plan.due(7)
    plan.was_saved(7)
    assert not plan.due(8)
    clock.now *= 2
    assert plan.due(9)
    never, clock = schedule(save_every_minutes=0)
    clock.now = 1e9
    assert not never.due(9)


def test_a_better_evaluation_is_saved_and_a_worse_one_is_not() -> None:
    plan, _ = schedule()
    for step, value, due in [(0, 0.3, False), (10, 0.2, False), (20, 0.5, True), (30, 0.5, False), (40, 0.9, True)]:
        plan.evaluated(step, {"accuracy/heldout": value})
        assert plan.due(step) is due
        if due:
            plan.was_saved(step)
    assert plan.best == Best(40, 0.9)
    again, _ = schedule()
    again.load_state_dict(plan.state_dict())
    again.evaluated(50, {"accuracy/heldout": 0.8})
    assert not again.due(50)


def test_a_best_metric_that_never_comes_is_said() -> None:
    plan, _ = schedule(best_metric="acuracy/heldout")
    plan.evaluated(10, {"accuracy/heldout": 0.8, "reward/mean": 1.0})
    said = plan.missing({"accuracy/heldout": 0.8, "reward/mean": 1.0})
    assert said is not None and "did you mean accuracy/heldout?" in said
    plan, _ = schedule()
    plan.evaluated(10, {"accuracy/heldout": 0.8})
    assert plan.missing({}) is None


def test_the_first_signal_stops_the_training_and_the_second_cancels() -> None:
    async def run(signals: int, training: bool) -> str:
        task = asyncio.current_task()
        assert task is not None
        stop = Stop(task)
        stop.training = training
        for _ in range(signals):
            stop.on(signal.SIGTERM)
        try:
            await asyncio.sleep(0.01)  # a cancellation arrives here
            await stop.asked()
        except StoppedError as stopped:
            return str(stopped)
        except asyncio.CancelledError:
            return "cancelled"

    assert asyncio.run(run(1, training=True)) == "SIGTERM"
    assert asyncio.run(run(2, training=True)) == "cancelled"
    assert asyncio.run(run(1, training=False)) == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stopped_it_is_known_by_name(number: signal.Signals) -> None:
    assert StoppedError(number).signal is number
