"""Lights on hand-made metrics, and on whole courses of runs; states of runs."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
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
    return {one.id: one.state for one in judge(steps_of(10, values), Table(), known.get)}.get(light, "absent")


def steps_of(count: int, values: dict[str, Any]) -> Table:
    table = Table()
    for step in range(1, count + 1):
        table.lines[step] = {name: v[step - 1] if isinstance(v, list) else v for name, v in values.items()}
    return table


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
        ({}, "staleness", "good"),  # only samples of older weights have any
        ({"policy/grad_norm": 0.0}, "gradient", "look"),
        ({"policy/grad_norm": 0.0, "policy/waits": 1.0}, "gradient", "absent"),  # only the critic learns
        ({"policy/skipped_updates": [0] * 8 + [1, 1]}, "skipped", "bad"),
        ({"policy/entropy": 0.001}, "entropy", "bad"),  # from the start
        ({"policy/entropy": [1.0] * 4 + [None] * 6}, "entropy", "unknown"),
        ({"policy/entropy": [1.0] * 2 + [0.001] * 3 + [None] * 5}, "entropy", "bad"),
        ({"accuracy/train": [0.1, 0.4, 0.5, 0.6, 0.5, 0.6, 0.5, 0.6, 0.5, 0.6]}, "accuracy", "good"),
        ({"accuracy/train": 0.0}, "accuracy", "bad"),
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
    assert state(rising, "fooled") == "unknown"
    assert state({"accuracy/train": 0.5}, "fooled") == "absent"


def test_few_evaluations_of_a_curve_that_bends_are_no_sign() -> None:
    """Five evaluations of a run that learns: a line through them may rise or not, their own intervals do."""
    accuracies = dict(zip((0, 15, 30, 45, 60), (0.27, 0.88, 0.93, 0.95, 0.91), strict=True))
    training = Table({step: {"reward/mean": step / 60 + step % 2 / 9} for step in range(1, 61)})

    def shown(names: Sequence[str], values: Mapping[int, float]) -> str:
        width = {"": 0.0, "/low": -0.03, "/high": 0.03}
        lines = {s: {f"accuracy/heldout{n}": value + width[n] for n in names} for s, value in values.items()}
        return next(one for one in judge(training, Table(lines), lambda key: None) if one.id == "fooled").word

    assert shown(["", "/low", "/high"], accuracies) == "fine"
    assert shown([""], accuracies) == "too uncertain"
    assert shown(["", "/low", "/high"], {s: 1 - a for s, a in accuracies.items()}) == "the reward may be fooled"
    assert shown(["", "/low", "/high"], {s: 0.5 + s % 2 / 100 for s in accuracies}) == "have a look"


def test_a_light_says_its_threshold_and_where_it_held() -> None:
    table = Table()
    for step in range(1, 9):
        table.lines[step] = {"mismatch/logprob_mean": 0.001 if step < 4 else 0.05}
    light = next(one for one in judge(table, Table(), OPTIONS.get) if one.id == "mismatch")
    assert light.value_text == "0.05; look above 0.01, act above 0.1 (trainer.mismatch_alarm, trainer.max_mismatch)"
    assert light.steps == [4, 5, 6, 7, 8]
    assert light.meaning == plain(about("mismatch/logprob_mean").meaning)
    assert "`" not in light.remedy and "](" not in light.remedy


def test_a_threshold_that_the_configuration_lacks_is_none() -> None:
    values = {"policy/grad_norm": 0.5, "mismatch/logprob_mean": 0.1}
    light = {one.id: one for one in judge(steps_of(10, values), Table(), {}.get)}
    assert (light["mismatch"].state, light["mismatch"].word) == ("unknown", "no threshold")
    assert "config.yaml has no number at trainer.mismatch_alarm" in light["mismatch"].value_text
    assert (light["gradient"].state, light["gradient"].value_text) == ("good", "0.5; look below 1e-12")


# -- courses of runs ---------------------------------------------------------------------------------------------------

CONFIG = """\
algorithm: {_target_: algorithms.grpo.GRPO, samples_per_prompt: 8}
trainer: {total_steps: 40, prompts_per_step: 8, max_staleness: 0, mismatch_alarm: 0.05, max_mismatch: 0.2,
  max_skipped_updates: 3}
learner: {max_grad_norm: 1.0}
reward: {max_failed_share: 0.2}
"""
BY_DESIGN = {"staleness", "learner_waits", "engine_waits"}
"""Lights of a synchronous run that say so from the first step."""
HEALTHY = {
    "reward/failed": 0.0, "policy/skipped_updates": 0.0, "length/truncated_share": 0.02, "mismatch/logprob_mean": 0.008,
    "kl/reference": 0.01, "weights/canary_change": 1.0, "time/step": 3.0, "time/learner_idle": 2.0,
    "time/engine_idle": 1.0,
}  # fmt: skip


def run_of(folder: Path, lines: list[dict[str, Any]], config: str = CONFIG) -> Run:
    """A folder of these lines of metrics.jsonl; each has `kind` and `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"time": 1.8e9 + 3 * one["step"], "seconds": 1.0} | one) + "\n" for one in lines)
    return Run("run", folder)


def learning(step: int, accuracy: float) -> list[dict[str, Any]]:
    """The lines of a step that goes as it should; every fifth one is evaluated."""
    noise = 0.02 * (-1) ** step
    own = {"reward/mean": accuracy + noise, "accuracy/train": accuracy - noise, "group/all_equal_share": 0.3}
    own |= {"policy/entropy": 0.8 - 0.01 * step, "policy/grad_norm": 0.4, "mismatch/ess": 0.99}
    return [{"kind": "step", "step": step} | HEALTHY | own, *evaluated(step, accuracy)]


def collapsed(step: int, silent: bool) -> list[dict[str, Any]]:
    """All answers are the same wrong one. `silent`: nothing is computed of samples without an advantage."""
    own = {"reward/mean": 0.0, "accuracy/train": 0.0, "group/all_equal_share": 1.0, "policy/grad_norm": 0.0}
    line = {"kind": "step", "step": step} | HEALTHY | own
    if silent:
        line = {name: value for name, value in line.items() if name not in ("kl/reference", "mismatch/logprob_mean")}
    else:
        line |= {"policy/entropy": 0.0004}
    return [line, *evaluated(step, 0.0)]


def evaluated(step: int, accuracy: float) -> list[dict[str, Any]]:
    return [{"kind": "evaluation", "step": step, "accuracy/heldout": accuracy}] if step % 5 == 0 else []


def states(run: Run) -> dict[str, str]:
    return {light.id: light.state for light in lights(run)}


def test_a_run_that_learns_is_green(tmp_path: Path) -> None:
    run = run_of(tmp_path, [line for step in range(1, 41) for line in learning(step, 0.2 + 0.015 * step)])
    assert {light.id: light.value_text for light in lights(run) if light.state != "good"} == {}
    assert len(states(run)) == 15


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_few_steps_are_too_few_to_say(tmp_path: Path, steps: int) -> None:
    run = run_of(tmp_path, [line for step in range(1, steps + 1) for line in learning(step, 0.3)])
    shown = {light.id: light for light in lights(run)}
    green = {name for name, light in shown.items() if light.state == "good"}
    assert green == (BY_DESIGN | {"weights"} if steps else set())  # weights: a measured change is a proof
    for light in (light for name, light in shown.items() if name not in green):
        assert (light.state, light.word) == ("unknown", "too few steps"), light.title
        assert f"{steps} of " in light.value_text and "steps" in light.value_text, light.value_text
    assert {"mismatch", "entropy", "kl", "skipped"} <= shown.keys()
    assert not steps or {"accuracy", "equal", "fooled", "gradient"} <= shown.keys()


def test_a_warning_comes_before_there_is_enough_for_green(tmp_path: Path) -> None:
    bad = {"mismatch/logprob_mean": 0.5, "policy/entropy": 0.001, "kl/reference": 2.0}
    run = run_of(tmp_path, [learning(1, 0.3)[0] | bad])
    assert {states(run)[name] for name in ("mismatch", "entropy", "kl")} == {"bad"}


@pytest.mark.parametrize("silent", [False, True])
def test_a_collapsed_run_is_green_nowhere_that_speaks_of_it(tmp_path: Path, silent: bool) -> None:
    lines = [line for step in range(1, 16) for line in learning(step, 0.5 + 0.01 * step)]
    for step in range(16, 21):  # it narrows
        narrow = {"policy/entropy": 0.4 * 0.2 ** (step - 15), "group/all_equal_share": 0.9, "reward/mean": 0.1}
        lines += [learning(step, 0.1)[0] | narrow | {"accuracy/train": 0.1}, *evaluated(step, 0.1)]
    for step in range(21, 41):
        lines += collapsed(step, silent)
        if step >= 25:
            now = states(run_of(tmp_path / str(step), lines))
            assert (now["equal"], now["accuracy"], now["entropy"], now["gradient"]) == ("bad", "bad", "bad", "look")
            assert now["fooled"] != "good"
            about_other_things = {"failed", "skipped", "truncated", "weights"} | BY_DESIGN
            about_other_things |= set() if silent else {"mismatch", "kl"}
            assert {name for name, one in now.items() if one == "good"} == about_other_things
    light = next(one for one in lights(run_of(tmp_path / "end", lines)) if one.id == "kl")
    assert light.value_text.endswith("; not reported since step 20") == silent


def test_an_evaluation_and_the_training_of_a_reward_have_no_lights_of_training(tmp_path: Path) -> None:
    assert lights(Run("run", make_evaluation(tmp_path / "ended", prompts=16))) == []
    going = run_of(tmp_path / "going", evaluated(0, 0.5), "evaluate: {samples: 4}\nmodel: {path: 'embedded:policy'}\n")
    assert lights(going) == []
    reward = [{"kind": "step", "step": step, "preference/loss": 0.6} for step in range(1, 9)]
    assert lights(run_of(tmp_path / "reward", reward, "stage: train\nreward: {learning_rate: 1.0e-5}\n")) == []


def test_without_a_verifier_the_light_says_what_is_missing(tmp_path: Path) -> None:
    lines = [learning(step, 0.3)[0] for step in range(1, 21)]
    for line in lines:
        del line["accuracy/train"]
    light = next(one for one in lights(run_of(tmp_path, lines)) if one.id == "fooled")
    assert (light.state, light.word) == ("unknown", "not measured")
    assert "no verifier" in light.value_text


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
