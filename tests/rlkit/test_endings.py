"""What stands on the screen when a run fails or is stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError

from rlkit.config.loading import load_config
from rlkit.endings import ending
from rlkit.experience import UserError
from rlkit.run import run
from rlkit.tracking.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "my run")
    yield folder
    folder.close()


def save(folder: RunFolder, step: int) -> None:
    (folder.checkpoints / f"step_{step:06d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (KeyboardInterrupt(), "interrupted (Ctrl-C)"),
        (asyncio.CancelledError(), "ended by SIGTERM"),
        (UserError("7 of 32 samples got no score"), "7 of 32 samples got no score"),
    ],
)
def test_cause_and_how_to_go_on(folder: RunFolder, error: BaseException, cause: str) -> None:
    assert ending(error, folder) == f"rlkit: {cause}"
    save(folder, 2)
    save(folder, 10)
    assert ending(error, folder).splitlines() == [
        f"rlkit: {cause}",
        f"To continue after step 10, use the same command with run_dir='{folder.path}' resume=auto",
    ]


def test_a_full_disk(folder: RunFolder) -> None:
    with pytest.raises(OSError, match="No space left") as full:
        Path("/dev/full").write_text("x")
    text = ending(full.value, folder)
    assert "the disk is full" in text
    assert str(folder.path) in text
    assert "MiB are free; make room there" in text


def test_a_defect_names_the_logs(folder: RunFolder) -> None:
    assert ending(IndexError("list index out of range"), folder).splitlines() == [
        "rlkit: IndexError: list index out of range",
        f"Logs: {folder.logs}/",
    ]


def test_a_dead_actor_is_named_with_its_own_log_and_without_rays_report(folder: RunFolder) -> None:
    """The class name and process are read from Ray's own report."""
    context = ActorDiedErrorContext(
        class_name="LearnerWorker", pid=4711, actor_id=b"0" * 16, error_message="Worker unexpectedly exits"
    )
    error = ActorDiedError(context)
    (folder.logs / "learner-0.log").write_text("all is well\nCUDA error: an illegal memory access\n")
    (folder.logs / "rollout-0.log").write_text("ParallelLMHead: Failed to load weights\n")
    text = ending(error, folder)
    assert text.index("illegal memory access") < text.index("rlkit: a rank of the learner (process 4711) died")
    assert "Failed to load weights" not in text
    assert "actor_id" not in text


def test_a_run_that_fails_before_its_first_record_gives_its_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its data are gone when they are read, which no check before the start can know."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"question": "What is {n} + 1?", "answer": "{n + 1}"}}\n' for n in range(64))
    data = tmp_path / "train.jsonl"
    arguments = ["data=jsonl", f"data.path={data}", "reward=rule", "run_dir=run", "tracking.console=plain"]
    data.write_text(rows)
    resolved = load_config(arguments)
    data.unlink()
    assert run(resolved) == 1
    shown = "".join(capfd.readouterr())
    assert shown.count("no such file") == 1
    assert "The run ended early, after step 0." in shown
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"logs", "tensorboard", "trackers.json"}
    assert "no such file" in (tmp_path / "run" / "logs" / "driver.log").read_text()
    data.write_text(rows)
    load_config(arguments)


@pytest.mark.parametrize(
    "record",
    [
        lambda folder: folder.append_metrics({"step": 0}),
        lambda folder: folder.append_samples([{"step": 1}]),
        lambda folder: folder.write_summary({}),
        lambda folder: save(folder, 1),
    ],
    ids=["metrics", "samples", "summary", "checkpoint"],
)
def test_a_folder_with_any_record_keeps_all(folder: RunFolder, record: Callable[[RunFolder], None]) -> None:
    folder.write_config("seed: 0\n")
    record(folder)
    fails(folder)
    assert all(file.exists() for file in (folder.config, folder.metrics, folder.samples))


def test_what_an_earlier_run_left_is_not_given_back(tmp_path: Path) -> None:
    with contextlib.closing(RunFolder(tmp_path / "run")) as first:
        first.write_config("seed: 0\n")
    with contextlib.closing(RunFolder(tmp_path / "run", resume=True)) as second:
        fails(second)
        assert second.config.exists()


def fails(folder: RunFolder) -> None:
    with pytest.raises(UserError), folder.given_back():
        raise UserError("failed")
