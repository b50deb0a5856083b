"""Lights on hand-made metrics, and on whole courses of runs; states of runs."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_evaluation, make_run

from rlkit.config.metric_table import about, plain
from rlkit.view import runs as runs_module
from rlkit.view.health import judge, lights
from rlkit.view.metrics import Table
from rlkit.view.runs import Run

OPTIONS = {
    "trainer.mismatch_alarm": 0.01, "trainer.max_mismatch": 0.1, "trainer.max_staleness": 2,
    "trainer.max_skipped_updates": 3, "trainer.prompts_per_step": 4, "algorithm.samples_per_prompt": 5,
    "reward.max_failed_share": 0.2, "learner.max_grad_norm": 1.0,
}  # fmt: skip


def state(values: dict[str, Any], light: str, **options: Any) -> str:
    """Of ten steps with these metrics, constant or by step."""
    known = OPTIONS | {key.replace("__", "."): value for key, value in options.items()}
    table = Table()
    for step in range(1, 11):
        table.lines[step] = {name: v[step - 1] if isinstance(v, list) else v for name, v in values.items()}
    return {one.id: one.state for one in judge(table, Table(), known.get)}.get(light, "absent")


@pytest.mark.parametrize(
    ("values", "light", "expected"),
    [
        ({"mismatch/logprob_mean": 0.005}, "mismatch", "good"),
        ({"mismatch/logprob_mean": 0.02}, "mismatch", "look"),
        ({"mismatch/logprob_mean": 0.2}, "mismatch", "bad"),
        ({"mismatch/logprob_mean": [0.005] * 9 + [0.2]}, "mismatch", "good"),  # one outlier is no state
        ({}, "mismatch", "unknown"),
        ({"staleness/mean": 1.0}, "staleness", "good"),
        ({"staleness/mean": 1.95}, "staleness", "look"),
        ({"mismatch/ess": 0.8}, "ess", "look"),
        ({"mismatch/ess": 0.3}, "ess", "bad"),
        ({}, "ess", "absent"),
        ({"weights/canary_change": 0.4}, "weights", "bad"),
        ({"time/learner_idle": 1.0, "time/step": 2.0}, "learner_waits", "look"),
        ({"time/engine_idle": 0.1, "time/step": 2.0}, "engine_waits", "good"),
        ({"policy/entropy": [1.0] * 5 + [0.05] * 5}, "entropy", "look"),
        ({"policy/entropy": [1.0] * 5 + [0.01] * 5}, "entropy", "bad"),
        ({"kl/reference": 0.3}, "kl", "look"),
        ({"policy/skipped_updates": [0] * 9 + [1]}, "skipped", "good"),
        ({"policy/skipped_updates": [0] * 4 + [1] * 6}, "skipped", "bad"),
        ({"policy/grad_norm": 3.0}, "gradient", "look"),
        ({"reward/failed": 1}, "failed", "look"),  # 1 of 20 samples
        ({"reward/failed": 3}, "failed", "bad"),
        ({"group/all_equal_share": 1.0}, "equal", "bad"),
        ({"length/truncated_share": 0.2}, "truncated", "look"),
        ({"critic/explained_variance": -0.1}, "critic", "bad"),
        ({"prm/pair_accuracy": 0.7}, "prm", "good"),
        ({"mismatch/logprob_mean": "NaN"}, "mismatch", "unknown"),
    ],
)
def test_lights(values: dict[str, Any], light: str, expected: str) -> None:
    assert state(values, light) == expected


def test_synchronous_runs_wait_by_design() -> None:
    waiting = {"time/learner_idle": 1.9, "time/step": 2.0}
    assert state(waiting, "learner_waits", trainer__max_staleness=0) == "good"
    assert state({}, "staleness", trainer__max_staleness=0) == "good"


def test_a_reward_that_rises_while_accuracy_falls() -> None:
    rising = {"reward/mean": [s / 10 for s in range(10)]}
    assert state(rising | {"accuracy/train": [1 - s / 20 for s in range(10)]}, "fooled") == "bad"
    assert state(rising | {"accuracy/train": [0.5, 0.6] * 5}, "fooled") == "look"
    assert state(rising | {"accuracy/train": [s / 20 for s in range(10)]}, "fooled") == "good"
    assert state(rising, "fooled") == "absent"


def test_a_light_says_its_threshold_and_where_it_held() -> None:
    table = Table()
    for step in range(1, 9):
        table.lines[step] = {"mismatch/logprob_mean": 0.001 if step < 4 else 0.05}
    light = next(one for one in judge(table, Table(), OPTIONS.get) if one.id == "mismatch")
    assert light.value_text == "0.05; look above 0.01, act above 0.1 (trainer.mismatch_alarm, trainer.max_mismatch)"
    assert light.steps == [4, 5, 6, 7, 8]
    assert light.meaning == plain(about("mismatch/logprob_mean").meaning)
    assert "`" not in light.remedy and "](" not in light.remedy


def test_states_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", 512, tokens=False, ended=False)
    run = Run("run", folder)
    assert run.state()[0] == "running"  # it was written to a moment ago
    for name in ("metrics.jsonl", "samples.jsonl"):
        os.utime(folder / name, (1, 1))
    quiet, words = run.state()
    assert quiet == "silent"
    assert "after step 4 of 4, without a summary: killed or crashed; logs/driver.log has its last words" in words
    with (folder / "logs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        locked = run.state()[0]
        # The look at it was no lock: a run that begins now would get it.
        monkeypatch.setattr(runs_module, "LOCKS", tmp_path / "none")
        assert run.state()[0] == "silent"
    assert locked == "running"
    (folder / "summary.json").write_text(json.dumps({"ended": "the data are solved"}))
    assert run.state() == ("ended", "ended after step 4 of 4 (the data are solved)")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": 5, "time": time.time()}) + "\n")
    assert run.metrics.step == 5
