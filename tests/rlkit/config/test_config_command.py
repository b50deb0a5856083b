"""`python -m rlkit.train` and `rlkit` as a user meets them: processes, exit codes, what is printed, how soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlkit import cli
from rlkit.config.compose import headline

HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "datasets", "math_verify")


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path or cwd), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def train(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "rlkit.train", *arguments, cwd=repository)


def test_a_wrong_configuration_exits_2_and_reports_everything(repository: Path) -> None:
    done = train(repository, "reward=polr", "trainer.total_step=3", "lr=1", "rollout.top_p=2")
    assert done.returncode == 2
    assert done.stdout == ""
    for text in ("did you mean polar?", "trainer.total_steps?", "learner.learning_rate?", "rollout.top_p=2: must be"):
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_come_before_anything_heavy(repository: Path) -> None:
    code = (
        "import sys, rlkit.train as t; code = t.main(['trainer.total_step=3', 'reward=polr', 'data=jsonl']);"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules];"
        "print(code, heavy)"
    )
    done = python("-c", code, cwd=repository)
    assert done.stdout.strip() == "2 []", done.stderr


def test_dry_run_prints_the_plan_and_loads_nothing_heavy(repository: Path, bare_model: Path, tmp_path: Path) -> None:
    arguments = [
        f"model.path={bare_model}",
        "reward=rule",
        "dry_run=true",
        f"run_dir={tmp_path}/run",
        "rollout.top_p=0.9",
    ]
    arguments += ["trainer.prompts_per_step=6", "algorithm.samples_per_prompt=5", "learner.minibatches_per_step=3"]
    arguments += ["trainer.total_steps=100"]
    code = (
        f"import sys, rlkit.train as t; code = t.main({arguments!r});"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = python("-c", code, cwd=repository)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "6 prompts x 5 samples = 30 responses" in done.stdout
    assert "2 prompts = 10 responses" in done.stdout
    assert "100 steps x 3 = 300 optimizer steps" in done.stdout
    assert "12,800 parameters" in done.stdout
    assert "weights 50.0 KiB" in done.stdout
    assert "rlkit: warning: rollout.top_p=0.9" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_every_model(repository: Path, bare_model: Path, tmp_path: Path) -> None:
    base = [f"model.path={bare_model}", f"run_dir={tmp_path}/run", "dry_run=true"]
    ppo = ["algorithm=ppo", "algorithm.kl_coefficient=0.1", "reward=implicit_prm", f"reward.model_path={bare_model}"]
    lines = train(repository, *base, *ppo).stdout.splitlines()
    amount = {name: line for line in lines for name in ("learner", "critic", "reward") if f"{name} " in line[:20]}
    for trained in ("learner", "critic"):  # 12,800 parameters
        assert "Adam's moments 100.0 KiB" in amount[trained]
        assert "gradients 50.0 KiB" in amount[trained]
    assert "frozen models 50.0 KiB" in amount["learner"]
    assert "frozen" not in amount["critic"]
    assert "weights 250.0 KiB" in amount["reward"]
    with_polar = train(repository, *base, "reward=[rule,polar]").stdout
    assert "activations" in next(line for line in with_polar.splitlines() if "reward worker" in line)
    assert "activations" not in train(repository, *base, "reward=rule").stdout.split("reward worker")[1]


def test_validating_leaves_no_folder_behind(bare_model: Path, tmp_path: Path, repository: Path) -> None:
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    arguments = ["-m", "rlkit.train", f"model.path={bare_model}", "reward=rule", "dry_run=true"]
    done = python(*arguments, cwd=empty, path=repository)
    assert done.returncode == 0, done.stderr
    assert list(empty.iterdir()) == []


def test_help_lists_groups_options_and_every_key(repository: Path) -> None:
    done = train(repository, "--help")
    assert done.returncode == 0, done.stderr
    for text in (
        "grpo (default)",
        "trainer.total_steps  an integer, at least 1; default 60 (model=tiny; else 100)",
        "Peak learning rate of AdamW.",
        "one of auto, float32, bfloat16",
        "algorithm.samples_per_prompt",
        "reward=rule",
        "data.path  text; required",
    ):
        assert text in done.stdout, text


def test_a_heading_is_the_first_line_of_the_class_or_else_of_its_module() -> None:
    class Documented:
        """Class.

        More.
        """

    class Undocumented(Documented):
        pass

    assert headline(Documented) == "Class."
    assert headline(Undocumented) == (__doc__ or "").partition("\n")[0] != ""


def test_file_option_reads_a_configuration(repository: Path, tmp_path: Path) -> None:
    assert train(repository, "--config").returncode == 2
    done = train(repository, "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml: cannot be read" in done.stderr


def test_ctrl_c_exits_130(repository: Path, bare_model: Path, tmp_path: Path) -> None:
    """The interrupt comes while a user's reward module is being imported."""
    ready = tmp_path / "ready"
    (tmp_path / "slow_reward.py").write_text(
        f"import pathlib, time\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(30)\n"
    )
    command = [sys.executable, "-m", "rlkit.train", f"model.path={bare_model}", "reward._target_=slow_reward.X"]
    environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def test_console_script_mirrors_the_module(repository: Path) -> None:
    direct, mirrored = train(repository, "lr=1"), python("-m", "rlkit.cli", "train", "lr=1", cwd=repository)
    assert (direct.returncode, direct.stderr) == (mirrored.returncode, mirrored.stderr)


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "trian: no such command; did you mean train?" in capsys.readouterr().err


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)
    assert cli.main([]) == 2


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_s_module_exists(repository: Path, name: str) -> None:
    module = cli.COMMANDS[name][0]
    assert (repository / f"{module.replace('.', '/')}.py").is_file()
