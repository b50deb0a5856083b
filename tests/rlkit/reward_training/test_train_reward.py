"""`python -m rlkit.train_reward` as a user meets it: messages, files, exit codes, a backend of one's own, ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import PYTHONPATH
from prm_fixture import write_chat_model, write_rollouts

from rlkit import cli, train_reward
from rlkit.config.messages import ConfigError
from rlkit.data.base import DataConfig, DataError
from rlkit.reward_training.base import Report, RewardTraining, RewardTrainingConfig
from rlkit.reward_training.command import load_reward_training

HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "datasets", "math_verify")


class Echo(RewardTraining):
    """A backend without a model: does what its `behaviour` says."""

    class Config(RewardTrainingConfig):
        behaviour: str = "good"
        """good, bad data, broken, or slow."""

    class Data(DataConfig):
        rows: int = 3
        """How many there are."""

    def run(self, report: Report) -> dict[str, Any]:
        if self.config.behaviour == "bad data":
            raise DataError("rows.jsonl:3 is bad")
        if self.config.behaviour == "broken":
            raise RuntimeError("no such luck")
        report.evaluation(0, **{"echo/loss": 2.0})
        report.begins(self.data.rows)
        for step in range(1, self.data.rows + 1):
            report(step, **{"echo/loss": 1.0 / step})
            if self.config.behaviour == "slow":
                time.sleep(60)
        report.samples([{"row": 1}])
        report.text("a table\nof two lines")
        report.warn("mind the gap")
        return {"rows": self.data.rows, "device": self.context.device}


ECHO = [f"reward._target_={__name__}.Echo", "threads=1"]


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_reward_training(arguments)
    return [str(problem) for problem in caught.value.problems]


def test_every_mistake_is_reported_with_the_name_that_was_meant(tmp_path: Path) -> None:
    (nothing,) = problems()
    assert nothing.startswith("data.path: needs a value; write data.path=VALUE (File with the rows")
    found = problems(
        "reward=implicit_pm", "lr=3", "reward.batchsize=2", "data.promt_column=q", "stage=evalute", "prompt_column=q"
    )
    for text in (
        "reward=implicit_pm: no such option; did you mean implicit_prm?",
        "lr=3: no such key; did you mean reward.learning_rate?",
        "reward.batchsize=2: no such key; did you mean reward.batch_size?",
        "data.promt_column=q: no such key; did you mean data.prompt_column?",
        "stage=evalute: did you mean evaluate? must be one of",
        "prompt_column=q: no such key; did you mean data.prompt_column?",
        "data.path: needs a value",
    ):
        assert any(problem.startswith(text) for problem in found), (text, found)
    rows = str(write_rollouts(tmp_path / "rows.jsonl", prompts=1))
    assert problems(f"data.path={rows}x", "reward.model_path=/nowhere", "reward.reference_path=/nowhere") == [
        "reward.model_path=/nowhere: no such folder: /nowhere",
        f"data.path={rows}x: no such file (looked from {Path.cwd()}).",
        "reward.reference_path=/nowhere: no such folder: /nowhere",
    ]
    both = problems(f"data.path={rows}", "data.heldout_path=x", "data.heldout_share=0.5")
    assert both == ["data.heldout_share=0.5: heldout_share has no effect with heldout_path: set one of them"]
    assert (
        "zero_stage=0 keeps no fp32" in problems(f"data.path={rows}", "reward.zero_stage=0", "reward.dtype=bfloat16")[0]
    )
    assert (
        "balance=prompt has no effect"
        in problems(f"data.path={rows}", "reward.balance=prompt", "reward.objective=dpo")[0]
    )
    assert "Echo can only train" in problems(*ECHO, "stage=evaluate")[0]
    assert (
        "is not a subclass of rlkit.reward_training.base.RewardTraining"
        in problems("reward._target_=rewards.verifiers.math.MathReward")[0]
    )


def test_nothing_heavy_is_loaded_to_say_so(repository: Path, tmp_path: Path) -> None:
    rows = write_rollouts(tmp_path / "rows.jsonl", prompts=1)
    code = (
        "import sys, rlkit.train_reward as t;"
        f"codes = [t.main(['data.path={rows}', 'dry_run=true']), t.main(['reward.lr=1']), t.main(['--help'])];"
        f"print(codes, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[0, 2, 0] []\n"), done.stderr
    for text in ("nothing was started (dry_run=true)", "reward=implicit_prm", "data.prompt_column", "reward.beta"):
        assert text in done.stdout
    assert "did you mean reward.learning_rate?" in done.stderr


def test_schedule_and_zero_stage() -> None:
    config = RewardTrainingConfig(epochs=1.5, batch_size=64)
    assert config.total_steps(130) == 5, "one and a half epochs of three batches"
    assert RewardTrainingConfig(steps=7).total_steps(130) == 7
    assert config.learner(100, "cpu").warmup_steps == 3 and config.learner(10, "cpu").warmup_steps == 1
    assert config.learner(100, "cpu").zero_stage == 0 and config.learner(100, "cuda").zero_stage == 1
    assert RewardTrainingConfig(dtype="float32").learner(9, "cuda").zero_stage == 0
    assert RewardTrainingConfig(zero_stage=3).learner(9, "cuda").zero_stage == 3


def test_a_backend_of_ones_own_leaves_a_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["train-reward", *ECHO, "data.rows=4", f"run_dir={run}"]) == 0
    printed = capfd.readouterr().out
    for text in (
        "step 1/4  loss 1",
        "step 4/4  loss 0.25",
        "of two lines",
        "warning: mind the gap",
        "finished: rows 4",
    ):
        assert text in printed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["echo/loss"]) for line in lines[:2]] == [
        ("evaluation", 0, 2),
        ("step", 1, 1),
    ]
    assert len(lines) == 5
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rows"] == 4 and summary["device"] == "cpu" and summary["wall_seconds"] > 0
    assert (run / "samples.jsonl").read_text() == '{"row":1}\n'
    assert list((run / "tensorboard").iterdir())
    assert yaml.safe_load((run / "config.yaml").read_text())["data"] == {"max_bad_row_share": 0.01, "rows": 4}

    assert train_reward.main([*ECHO, f"run_dir={run}"]) == 1
    assert "already holds a run" in capfd.readouterr().err

    again = ["--config", str(run / "config.yaml"), f"run_dir={tmp_path / 'again'}"]
    assert train_reward.main(again) == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["rows"] == 4


def test_errors_exit_1_with_a_message_and_bugs_with_their_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_reward.main([*ECHO, "reward.behaviour='bad data'", f"run_dir={tmp_path / 'a'}"]) == 1
    assert capfd.readouterr().err == "rlkit: rows.jsonl:3 is bad\n"
    assert train_reward.main([*ECHO, "reward.behaviour=broken", f"run_dir={tmp_path / 'b'}"]) == 1
    error = capfd.readouterr().err
    assert "test_train_reward.py" in error and "rlkit: RuntimeError: no such luck" in error
    assert not (tmp_path / "b" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_in_order(repository: Path, tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run"
    arguments = ["reward._target_=test_train_reward.Echo", "reward.behaviour=slow", f"run_dir={run}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), PYTHONPATH])}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlkit.train_reward", *arguments],
        cwd=repository,
        env=environment,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 120
        while "step" not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert error.decode().count("\n") == 1 and b"rlkit: " in error


@pytest.mark.slow
def test_two_ranks_train_as_one_does_and_end_together(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    rows = write_rollouts(tmp_path / "rows.jsonl")
    common = [f"data.path={rows}", f"reward.model_path={model}", "threads=1", "reward.steps=3", "reward.batch_size=10"]
    common += ["reward.learning_rate=1e-3", "reward.beta=1", "reward.tokens_per_microbatch=40"]
    losses = []
    for ranks in (1, 2):
        run = tmp_path / f"ranks{ranks}"
        assert train_reward.main([*common, f"reward.ranks={ranks}", f"run_dir={run}"]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["prm/loss"] for line in lines if line["kind"] == "step"])
        losses[-1].append(json.loads((run / "summary.json").read_text())["after"]["prm/heldout_cross_entropy"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    bad = write_rollouts(tmp_path / "bad.jsonl", prompts=1)
    assert train_reward.main([f"data.path={bad}", *common[1:], "reward.ranks=2", f"run_dir={tmp_path / 'bad'}"]) == 1
