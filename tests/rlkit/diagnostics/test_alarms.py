"""Alarms that read the step's metrics alone."""

from __future__ import annotations

from rlkit.diagnostics.alarms import Hacking, NoSignal
from rlkit.diagnostics.base import StepRecord


def test_a_run_in_which_no_group_differs_says_that_nothing_was_learnt() -> None:
    signal = NoSignal(NoSignal.Config(), {})
    nothing = {"advantage/mean_absolute": 0.0, "group/all_equal_share": 1.0, "reward/mean": 0.0}
    said = [signal.check(StepRecord(step, nothing)).warning for step in range(1, 10)]
    assert [text != "" for text in said] == [step == 5 for step in range(1, 10)]
    assert "nothing was learnt in the first 5 steps" in said[4]
    again = NoSignal(NoSignal.Config(), {})
    again.load_state_dict(signal.state_dict())
    assert again.conclude(nothing).scalars == {"nothing_learnt": True}
    assert "nothing was learnt in this run" in again.conclude(nothing).warning
    again.check(StepRecord(10, nothing | {"advantage/mean_absolute": 0.1}))
    assert again.conclude(nothing).scalars == {"nothing_learnt": False}
    assert again.conclude(nothing).warning == ""


def hacking(window: int) -> Hacking:
    return Hacking(Hacking.Config(), {"trainer": {"hacking_alarm_steps": window}})


def alarm_after(steps: list[dict[str, float]], window: int = 3) -> list[str]:
    alarm = hacking(window)
    said = [alarm.check(StepRecord(step, metrics)).warning for step, metrics in enumerate(steps, start=1)]
    return [text for text in said if text]


def test_a_reward_that_rises_while_answers_get_worse_is_reported_once_per_window() -> None:
    steps = [{"reward/mean": 0.1 * i, "accuracy/train": 0.9 - 0.05 * i} for i in range(9)]
    heard = alarm_after(steps)
    assert len(heard) == 2  # after steps 6 and 9
    assert "mean reward rose from 0.100 to 0.400" in heard[0]
    assert "fell from 85.0% to 70.0%" in heard[0]
    prm = [{"prm/pair_accuracy": 0.5 + 0.05 * i, "accuracy/train": 0.9 - 0.05 * i} for i in range(6)]
    assert "pair accuracy rose" in alarm_after(prm)[0]


def test_no_alarm_while_both_rise_or_nothing_is_verified() -> None:
    rising = [{"reward/mean": 0.1 * i, "accuracy/train": 0.1 * i} for i in range(8)]
    assert alarm_after(rising) == []
    assert alarm_after([{"reward/mean": 0.1 * i} for i in range(8)]) == []
    falling = [{"reward/mean": 0.1 * i, "accuracy/train": -0.1 * i} for i in range(8)]
    assert alarm_after(falling[:5]) == []  # too early to compare
    assert alarm_after(falling, window=0) == []


def test_a_restored_alarm_goes_on_as_if_it_had_not_stopped() -> None:
    records = [StepRecord(i, {"reward/mean": 0.1 * i, "accuracy/train": 0.9 - 0.05 * i}) for i in range(12)]
    whole = hacking(3)
    said = [whole.check(record) for record in records]
    for stop in range(12):
        first, second = hacking(3), hacking(3)
        for record in records[:stop]:
            first.check(record)
        second.load_state_dict(first.state_dict())
        assert [second.check(record) for record in records[stop:]] == said[stop:]
