"""What makes a run stop or warn."""

from __future__ import annotations

import pytest

from rlkit.config.schema import TrainerConfig
from rlkit.metrics import TrainingFailedError, UpdateGuard

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
