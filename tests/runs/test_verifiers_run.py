"""The real `verifiers` in interpreters of their own: the command of docs/agents.md learns, and mistakes are named."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from own_venv import own_python
from paths import ROOT
from run_fixture import Run

from rlkit.environments.foreign.verifiers import SCRIPT, Verifiers

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs/agents.md").read_text()
(ENVIRONMENT,) = re.findall(r"<!-- my_sums\.py -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
(COMMAND,) = re.findall(r"python -m rlkit\.train (environment=verifiers.*?)\n```", PAGE, flags=re.DOTALL)
BATCH = ("trainer.prompts_per_step=16", "trainer.evaluation_prompts=64", "algorithm.samples_per_prompt=8")
SEEN = ("tracking.sample_groups_per_step=null",)


@pytest.fixture(scope="session")
def classic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `load_environment`."""
    return own_python(tmp_path_factory.getbasetemp(), "verifiers==0.3.1")


@pytest.fixture(scope="session")
def current(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tasksets alone."""
    return own_python(tmp_path_factory.getbasetemp(), "verifiers==0.4.0")


def trained(folder: Path, *words: str, cwd: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records and samples."""
    folder.mkdir()
    keys = {word.partition("=")[0] for word in words}
    run = Run(folder, *words, cwd=cwd, without=("reward", *keys))
    try:
        assert run.end(600) == 0, run.text
        assert run.left_after(10) == [] and bridges(folder.parent) == []
        return run.records(), run.records("samples")
    finally:
        run.clean_up()


def bridges(folder: Path) -> list[int]:
    """Processes of bridges whose interpreter is named by a path in here. Their environment has nothing of the run's."""

    def left() -> list[int]:
        commands = [(process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return [pid for pid, words in commands if SCRIPT in words and words[0].startswith(str(folder))]

    deadline = time.monotonic() + 5
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    return left()


def of_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = [record for record in records if record["kind"] == "step"]
    for record in steps:
        assert record["reward/failed"] == 0 and record["mismatch/logprob_max"] < 1e-3, record
        assert record["environment/observation_tokens"] > 0 and record["environment/success"] > 0, record
    return steps


def test_the_command_of_the_docs_learns_and_what_it_samples_depends_on_no_clock(classic: Path, tmp_path: Path) -> None:
    (tmp_path / "my_sums.py").write_text(ENVIRONMENT)
    (tmp_path / "verifiers-venv").symlink_to(classic.parent.parent)
    words = (*shlex.split(COMMAND.replace("\\\n", " ")), *BATCH, *SEEN, "trainer.evaluate_every_steps=12")
    records, samples = trained(tmp_path / "one", *words, "trainer.total_steps=12", cwd=tmp_path)
    accuracies = [record["accuracy/heldout"] for record in records if "accuracy/heldout" in record]
    assert accuracies[-1] >= accuracies[0] + 0.15, accuracies
    steps = of_steps(records)
    assert len(steps) == 12 and 0 < steps[0]["environment/metric/calc_calls"] < 3
    assert {turn["role"] for sample in samples for turn in sample["turns"]} == {"assistant", "tool"}

    again, sampled = trained(tmp_path / "again", *words, "trainer.total_steps=2", cwd=tmp_path)
    assert [record["reward/mean"] for record in of_steps(again)] == [record["reward/mean"] for record in steps[:2]]
    assert sampled and sampled == [sample for sample in samples if sample["step"] <= 2]


def test_tasksets_and_agents_of_the_current_version_are_trained_on(current: Path, tmp_path: Path) -> None:
    (tmp_path / "venv").symlink_to(current.parent.parent)
    python = f"environment.python={tmp_path / 'venv/bin/python'}"
    words = ("environment=verifiers", python, "environment.id=guess_v1", "model=agent")
    budgets = ("environment.max_turns=5", "environment.max_turn_tokens=4", "rollout.max_response_tokens=64")
    steps = "trainer.total_steps=2"
    records, _ = trained(tmp_path / "one", *words, *budgets, *SEEN, steps, cwd=ROOT / "tests" / "fixtures")
    for record in of_steps(records):
        assert 0 < record["environment/metric/reward_hit"] == pytest.approx(record["reward/mean"])
        assert 1 < record["environment/turns"] <= 5


def test_mistakes_are_named(classic: Path, current: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sums.py").write_text(ENVIRONMENT)
    (tmp_path / "old.py").write_text("def load_environment():\n    raise KeyError('no data')\n")
    compares = ENVIRONMENT.replace("def right(completion, answer)", "def right(completions, answers)")
    (tmp_path / "group.py").write_text(compares.replace("float((completion[-1]", "[0.0]  # ((completion[-1]"))
    (tmp_path / "evaluates.py").write_text(ENVIRONMENT.replace("dataset=Dataset", "eval_dataset=Dataset"))
    monkeypatch.chdir(tmp_path)

    def wrong(python: Path, name: str, **options: Any) -> str:
        (message,) = Verifiers.check(Verifiers.Config(python=str(python), id=name, **options))
        assert message.startswith(f"environment.id={name}: ")
        return message

    assert "no module nothing with a load_environment; install" in wrong(classic, "nothing")
    assert "no data" in wrong(classic, "old")
    assert "compares the rollouts of a group" in wrong(classic, "group")
    assert "unexpected keyword argument 'colour'" in wrong(classic, "my_sums", arguments={"colour": "red"})
    assert "install 'verifiers>=0.3.1,<0.4' beside it" in wrong(current, "old")
    assert "'nothing' not found" in wrong(current, "nothing")
    assert "nothing to train on" in wrong(classic, "evaluates")
    config = Verifiers.Config(python=str(classic), id="my_sums", arguments={"problems": 64})
    train, heldout = (Verifiers.tasks(config, split, 0) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 64 and not {t.messages for t in train} & {t.messages for t in heldout}
