"""`rlkit sync` and `rlkit export` of run folders that the real writers made."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from adapter_fixture import need
from own_trackers import CALLS
from paths import ROOT
from test_packages import commands
from tracked_run import report

from rlkit import export, sync
from rlkit.config.tracking import TrackingConfig
from rlkit.tracking import RunFolder, Tracker


@pytest.fixture(autouse=True)
def fresh() -> None:
    CALLS.clear()


def recorded(tmp_path: Path, steps: int = 3, ends: bool = True, trackers: tuple[Any, ...] = ()) -> Path:
    """A run without trackers; `metrics.jsonl` ends with half a line."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(
        f"seed: 7\ntrainer: {{total_steps: {steps}}}\ntracking: {{trackers: [{{kind: own_trackers.Remembering}}]}}\n"
    )
    with Tracker(TrackingConfig(console="off", trackers=trackers), folder, steps, capture_output=False) as run:
        run.evaluation(0, "accuracy/heldout", {"accuracy/heldout": 0.25})
        for step in range(1, steps + 1):
            report(run, step, step / 10)
        if ends:
            run.finish({})
    with folder.metrics.open("a") as file:
        file.write('{"kind": "step", "st')
    return folder.path


def synced(run: Path, *others: str) -> list[tuple[Any, ...]]:
    CALLS.clear()
    assert sync.main([str(run), "tracker=own_trackers.Remembering", *others]) == 0
    return list(CALLS)


def test_a_run_is_sent_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded(tmp_path)
    calls = synced(run)
    assert calls[0][0] == "start" and calls[0][1]["seed"] == 7 and calls[0][2:] == ("run", None, 1)
    assert [call[1] for call in calls if call[0] == "scalars"] == [0, 1, 2, 3]
    assert calls[1] == ("scalars", 0, {"accuracy/heldout": 0.25})
    loss = calls[2][2].pop("policy/loss")
    assert loss != loss and calls[2] == ("scalars", 1, {"reward/mean": 0.1, "evaluation/pass@4": 0.1})
    assert [call[1] for call in calls if call[0] == "samples"] == [1, 2, 3]
    assert calls[-1] == ("close", "finished")
    assert "sent 4 records and 12 samples to board of run" in capsys.readouterr().out
    assert synced(run) == []
    assert "nothing new" in capsys.readouterr().out


def test_a_run_that_grows_is_sent_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recorded(tmp_path, 2, ends=False)
    assert synced(run) == []  # too fresh
    monkeypatch.setattr(sync, "SETTLED_SECONDS", 0.0)
    assert synced(run)[-1] == ("close", "running")
    lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    times = [json.loads(line)["time"] for line in lines]
    later = [
        {"kind": "evaluation", "step": 2, "time": times[-1] + 1e-3, "accuracy/heldout": 0.5},
        {"kind": "step", "step": 3, "time": times[-1] + 2e-3, "reward/mean": "Infinity"},
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, *map(json.dumps, later)]) + "\n")
    start, *calls = synced(run)
    assert start[2:] == ("run", "id-1", 3)
    assert calls[:2] == [
        ("scalars", 2, {"accuracy/heldout": 0.5}),
        ("scalars", 3, {"reward/mean": float("inf")}),
    ]


def test_what_a_resumed_run_did_again_is_sent_again(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    synced(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = json.loads(lines[3]) | {"reward/mean": 0.7}
    again["time"] += 1
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(again)]) + "\n")
    start, first, *_ = synced(run)
    assert start[2:] == ("run", "id-1", 3)
    assert (first[1], first[2]["reward/mean"]) == (3, 0.7)


def test_what_the_run_sent_itself_is_not_sent_again(tmp_path: Path) -> None:
    own = ({"kind": "own_trackers.Remembering"},)
    assert synced(recorded(tmp_path, trackers=own)) == []


def test_the_name_of_a_run_may_have_an_equals_sign(tmp_path: Path) -> None:
    run = recorded(tmp_path).rename(tmp_path / "lr=1e-6")
    assert [call[1] for call in synced(run) if call[0] == "scalars"] == [0, 1, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(export.FORMATS, "own", ("json", lambda run, into: CALLS.append((run.folder, into))))
        assert export.main(["own", str(run), "into=there"]) == 0
    assert CALLS[-1] == (run, Path("there"))


def test_mistakes_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(code: int, *arguments: str) -> str:
        assert sync.main(list(arguments)) == code
        return capsys.readouterr().err

    run = recorded(tmp_path)
    assert "name run folders and one tracker" in answer(2, "tracker=tensorboard")
    assert "there is no kind 'wanddb'; did you mean wandb?" in answer(2, str(run), "tracker=wanddb")
    assert "there is no option projekt" in answer(2, str(run), "tracker={kind:tensorboard,projekt:x}")
    assert "tracker={kind:tensorboard: " in answer(2, str(run), "tracker={kind:tensorboard")
    assert "no such argument" in answer(2, str(run), "tracker=tensorboard", "follow=true")
    assert "holds no run" in answer(1, str(tmp_path), "tracker=tensorboard")
    assert "tracker Unstartable: ConnectionError: nobody answers" in answer(
        1, str(run), "tracker=own_trackers.Unstartable"
    )
    with (run / "logs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "sends to Remembering itself" in answer(1, str(run), "tracker=own_trackers.Remembering")
    assert export.main(["inspect", str(run), "follow=true"]) == 2
    assert "name a format and a run" in capsys.readouterr().err
    assert export.main(["inspekt", str(run)]) == 2
    assert "did you mean inspect?" in capsys.readouterr().err
    assert export.main(["inspect"]) == 2
    assert "name a format and a run" in capsys.readouterr().err


def test_tensorboard_shows_the_times_of_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = recorded(tmp_path)
    assert sync.main([str(run), "tracker=tensorboard"]) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines()[1:-1]]
    assert [(e.step, e.wall_time) for e in events.Scalars("reward/mean")] == list(zip((1, 2, 3), times, strict=True))


@pytest.mark.slow
def test_export_to_trackio_has_every_sample(tmp_path: Path) -> None:
    need("trackio")
    run = recorded(tmp_path)
    commands(tmp_path, ["-m", "rlkit.export", "trackio", str(run), f"into={tmp_path / 'elsewhere'}"])
    with sqlite3.connect(tmp_path / "elsewhere" / "rlkit.db") as board:
        assert list(board.execute("SELECT DISTINCT run_name FROM metrics")) == [("run",)]
    assert len(list((tmp_path / "elsewhere" / "traces").rglob("*.jsonl"))) == 3 * 6
    assert not (run / "trackers.json").exists()


LINES = re.findall(r"^python -m (rlkit\.(?:sync|export) .*)", (ROOT / "docs" / "trackers.md").read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_commands_of_the_page_run(line: str, tmp_path: Path) -> None:
    (package,) = re.findall(r"mlflow|trackio|inspect", line)
    need({"inspect": "inspect_ai"}.get(package, package), package)
    (tmp_path / "runs").mkdir()
    recorded(tmp_path).rename(tmp_path / "runs" / "x")
    commands(tmp_path, ["-m", *shlex.split(line)])


@pytest.mark.slow
def test_export_to_inspect(tmp_path: Path) -> None:
    need("inspect_ai", "inspect")
    from inspect_ai.log import read_eval_log

    from rlkit.trackers import inspect_logs

    run = recorded(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect_logs, "LARGEST", 14)
        assert export.main(["inspect", str(run)]) == 0
    logs = sorted((run / "inspect").iterdir())
    assert [log.name for log in logs] == ["0000_steps_000001_000002.eval", "0001_steps_000003_000003.eval"]
    log = read_eval_log(str(logs[0]))
    assert (log.status, log.eval.task, len(log.samples or [])) == ("success", "run steps 1-2", 12)
    assert log.eval.viewer is not None and log.eval.viewer.trust_content is False
    sample = next(one for one in log.samples or [] if (one.id, one.epoch) == ("s00002-g1", 2))
    assert (sample.target, sample.output.completion) == (["72"], "step 2 g1 worst")
    assert [message.text for message in sample.input] == ["question g1"]  # type: ignore[union-attr]
    assert {name: score.value for name, score in (sample.scores or {}).items()} == {
        "reward": -1.0, "math": -1.0, "advantage": -1.0
    }  # fmt: skip
    assert (sample.metadata["step"], sample.metadata["rank"]) == (2, "worst")
    assert export.main(["inspect", str(run)]) == 0
    assert [log.name for log in (run / "inspect").iterdir()] == ["0000_steps_000001_000003.eval"]
