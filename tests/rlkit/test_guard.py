"""What makes a run stop or warn."""

from __future__ import annotations

import pytest

from rlkit.config.schema import TrainerConfig
from rlkit.metrics import HackingAlarm, NoSignal, TrainingFailedError, UpdateGuard

FINE = {"policy/trained_samples": 8.0, "policy/skipped_updates": 0.0, "mismatch/logprob_mean": 1e-6}


def test_skipped_updates_in_a_row_stop_the_run_and_a_good_one_between_them_does_not() -> None:
    said: list[str] = []
    guard = UpdateGuard(TrainerConfig(max_skipped_updates=2), said.append)
    skipped = FINE | {"policy/skipped_updates": 1.0}
    for metrics in (skipped, FINE, skipped):
        guard.check(metrics)
    with pytest.raises(TrainingFailedError, match=r"2 updates in a row .* of the critic"):
        guard.check(FINE | {"critic/skipped_updates": 1.0})
    assert len(said) == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mismatch/logprob_mean": 0.2}, "disagree by 0.2"),
        ({"mismatch/logprob_mean": float("nan")}, "disagree by nan"),
        ({"policy/trained_samples": 0.0}, "nothing to train on"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, float], text: str) -> None:
    said: list[str] = []
    guard = UpdateGuard(TrainerConfig(), said.append)
    guard.check(FINE)
    assert said == []
    guard.check(FINE | change)
    assert len(said) == 1
    assert text in said[0]


def test_a_mismatch_above_the_limit_stops_the_run_after_three_steps_in_a_row() -> None:
    apart = FINE | {"mismatch/logprob_mean": 0.3}
    guard = UpdateGuard(TrainerConfig(), lambda _: None)
    for metrics in (apart, apart, FINE, apart, FINE | {"mismatch/logprob_mean": float("nan")}):
        guard.check(metrics)
    resumed = UpdateGuard(TrainerConfig(), lambda _: None)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(TrainingFailedError):
        resumed.check(apart)
    UpdateGuard(TrainerConfig(), lambda _: None).load_state_dict({"skipped_updates": 1})  # of an older checkpoint
    with pytest.raises(TrainingFailedError, match=r"trainer\.max_mismatch=0\.2 on average \(now 0\.3\)"):
        guard.check(apart)
    unlimited = UpdateGuard(TrainerConfig(max_mismatch=None), lambda _: None)
    for _ in range(9):
        unlimited.check(apart)


def test_a_run_in_which_no_group_differs_says_that_nothing_was_learnt() -> None:
    said: list[str] = []
    signal = NoSignal(said.append)
    nothing = {"advantage/mean_absolute": 0.0, "group/all_equal_share": 1.0, "reward/mean": 0.0}
    for _ in range(9):
        signal.check(nothing)
    assert len(said) == 1
    assert "nothing was learnt in the first 5 steps" in said[0]
    again = NoSignal(said.append)
    again.load_state_dict(signal.state_dict())
    assert again.nothing_learnt
    again.check(nothing | {"advantage/mean_absolute": 0.1})
    assert not again.nothing_learnt


def alarm_after(steps: list[dict[str, float]], window: int = 3) -> list[str]:
    heard: list[str] = []
    alarm = HackingAlarm(window, heard.append)
    for metrics in steps:
        alarm.check(metrics)
    return heard


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
