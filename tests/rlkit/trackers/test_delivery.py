"""Nothing that a tracker does, or fails to do, reaches the run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_trackers
import pytest
from own_trackers import CALLS, GATE, HANGS
from paths import ROOT
from tracked_run import rows

from rlkit import sync
from rlkit.config.tracking import TrackingConfig
from rlkit.trackers import delivery
from rlkit.tracking import RunFolder, Tracker


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    CALLS.clear()
    GATE.clear()
    HANGS.clear()
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(delivery, "_end_with_the_program", lambda code: None)
    yield
    GATE.set()


def tracker(path: Path, *kinds: Any, resume: bool = False, first_step: int = 1, steps: int = 3) -> Tracker:
    trackers = tuple(f"own_trackers.{kind}" if isinstance(kind, str) else kind for kind in kinds)
    folder = RunFolder(path / "run", resume=resume)
    folder.write_config("seed: 7\n")
    config = TrackingConfig(console="plain", trackers=trackers)
    return Tracker(config, folder, steps, capture_output=False, first_step=first_step)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "tracker " in line or line.startswith("waiting")]


def sent_by_sync(path: Path, kind: str, code: int = 0) -> list[int]:
    """Steps."""
    CALLS.clear()
    assert sync.main([str(path / "run"), f"tracker=own_trackers.{kind}"]) == code
    return [call[1] for call in CALLS if call[0] == "scalars"]


def test_all_that_a_run_reports_arrives_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, "Remembering") as run:
        run.evaluation(0, "accuracy/heldout", {"accuracy/heldout": 0.5})
        run.step(1, {"reward/mean": 1.0})
        run.folder.append_samples(rows(1))
        run.warn("look")
        run.warn("look")
        run.finish({})
    assert CALLS == [
        ("start", {"seed": 7}, "run", None, 1),
        ("scalars", 0, {"accuracy/heldout": 0.5}),
        ("scalars", 1, {"reward/mean": 1.0}),
        ("samples", 1, [("g1", "best"), ("g1", "worst"), ("g0", "best"), ("g0", "worst")]),
        ("alert", "warn", "run: warning", "look"),
        ("close", "finished"),
    ]
    assert said(capsys) == ["tracker Remembering: board of run"]
    entry = json.loads((tmp_path / "run" / "trackers.json").read_text())["Remembering"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (entry["id"], entry["until"]) == ("id-1", last["time"])


def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    with tracker(tmp_path, "Remembering"):
        pass
    with pytest.raises(KeyboardInterrupt), tracker(tmp_path, "Remembering", resume=True, first_step=5):
        raise KeyboardInterrupt
    assert CALLS[2:] == [("start", {"seed": 7}, "run", "id-1", 5), ("close", "stopped")]


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no luck"), tracker(tmp_path, "Remembering"):
        raise ValueError("no luck")
    assert CALLS[1:] == [("alert", "error", "run ended early", "ValueError: no luck"), ("close", "failed")]


def test_texts_are_sent_a_hundred_times(tmp_path: Path) -> None:
    few = {"kind": "own_trackers.Remembering", "sample_groups": 1}
    with tracker(tmp_path, few, steps=1000) as run:
        for step in range(1, 51):
            run.folder.append_samples(rows(step))
    sent = [call for call in CALLS if call[0] == "samples"]
    assert [call[1] for call in sent] == [1, 10, 20, 30, 40, 50]
    assert sent[0][2] == [("g1", "best"), ("g1", "worst")]
    CALLS.clear()
    with tracker(tmp_path, {**few, "sample_groups": 0}, resume=True) as run:
        run.folder.append_samples(rows(1))
    assert [call[0] for call in CALLS] == ["start", "close"]


def test_one_that_raises_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, "Raising", "Unstartable", "Forgetful", "Remembering") as run:
        for step in (1, 2, 3):
            run.step(step, {})
    assert sorted(said(capsys)) == [
        "tracker Forgetful: does not take part in this run: start() returned 'id', not a Started",
        "tracker Raising: board of run",
        "tracker Raising: of 3 calls 0 were dropped and 3 failed",
        "tracker Raising: scalars failed: SystemExit: no room for step 1; the run continues",
        "tracker Remembering: board of run",
        "tracker Unstartable: start failed: ConnectionError: nobody answers; the run continues without it",
    ]
    assert [call[1] for call in CALLS if call[0] == "scalars"] == [1, 2, 3]  # of the other one


@pytest.mark.parametrize("kind", ["Hanging", "HangingStart"])
def test_one_that_hangs_is_left_behind(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, kind) as run:
        for step in (1, 2, 3):
            run.step(step, {})
        assert kind == "HangingStart" or HANGS.wait(60)
        assert (run.folder.path / "trackers.json").exists() == (kind == "Hanging")  # though nothing has arrived
    waiting, left = [line for line in said(capsys) if "board" not in line]
    assert waiting == f"waiting for {kind} to send what is left, at most 0.2 s"
    calls = 3 if kind == "Hanging" else 4  # with close()
    assert left == f"tracker {kind}: is left behind: it has not sent everything ({calls} calls) in time"


def test_what_a_slow_one_has_no_room_for_is_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 60.0)
    monkeypatch.setattr(delivery, "WAITING", 20)
    monkeypatch.setattr(delivery, "TEXTS_WAITING", 5)
    with tracker(tmp_path, "Hanging", steps=100) as run:
        run.step(1, {})
        assert HANGS.wait(60)
        run.folder.append_samples(rows(1))
        for step in range(2, 101):
            run.step(step, {})
            run.folder.append_samples(rows(step))
        GATE.set()
    assert [call[1] for call in CALLS if call[0] == "scalars"] == list(range(1, 19))
    assert [call[1] for call in CALLS if call[0] == "samples"] == [1, 2, 3]
    lines = said(capsys)
    assert "cannot keep up (6 calls are waiting): it will lack some numbers or texts" in lines[1]
    assert lines[-1] == "tracker Hanging: of 200 calls 179 were dropped and 0 failed"
    assert len(lines) == 3


def test_sync_sends_all_from_the_first_call_on_that_failed(tmp_path: Path) -> None:
    with tracker(tmp_path, "Flaky") as run:
        for step in (1, 2, 3):
            run.step(step, {})
    with tracker(tmp_path, "Flaky", resume=True, first_step=4) as run:
        run.step(4, {})
        run.finish({})
    assert sent_by_sync(tmp_path, "Flaky", code=1) == []
    GATE.set()
    assert sent_by_sync(tmp_path, "Flaky") == [2, 3, 4]
    assert sent_by_sync(tmp_path, "Flaky") == []


def test_sync_sends_all_from_the_first_call_on_that_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 60.0)
    monkeypatch.setattr(delivery, "WAITING", 2)
    with tracker(tmp_path, "Hanging") as run:
        run.step(1, {})
        assert HANGS.wait(60)
        for step in (2, 3, 4):
            run.step(step, {})
        GATE.set()
        deadline = time.monotonic() + 60
        while len(CALLS) < 4 and time.monotonic() < deadline:  # start and three steps
            time.sleep(0.01)
        run.step(5, {})
        run.finish({})
    assert [call[1] for call in CALLS if call[0] == "scalars"] == [1, 2, 3, 5]
    assert sent_by_sync(tmp_path, "Hanging") == [4, 5]
    assert sent_by_sync(tmp_path, "Hanging") == []


def test_a_flood_of_warnings_is_no_flood_of_alerts(tmp_path: Path) -> None:
    with tracker(tmp_path, "Remembering") as run:
        for number in range(100):
            run.warn(f"warning {number}")
    assert [call[3] for call in CALLS if call[0] == "alert"] == [f"warning {number}" for number in range(10)]


def test_a_package_that_hangs_at_exit_does_not_keep_the_process(tmp_path: Path) -> None:
    code = f"""
import atexit, time
from pathlib import Path
from rlkit.trackers import delivery
from test_delivery import tracker
delivery.CLOSE_SECONDS, delivery.EXIT_SECONDS = 0.2, 0.3
atexit.register(time.sleep, 3600)
with tracker(Path({str(tmp_path)!r}), "Hanging") as run:
    run.step(1, {{}})
    run.finish({{}})
"""
    folders = [ROOT, ROOT / "tests" / "fixtures", Path(__file__).parent]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(map(str, folders))}, timeout=60, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"is left behind" in done.stdout


def test_a_ledger_that_is_broken_or_cannot_be_written_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "run" / "trackers.json").mkdir(parents=True)
    with tracker(tmp_path, "Remembering"):
        pass
    (tmp_path / "run" / "trackers.json").rmdir()
    (tmp_path / "run" / "trackers.json").write_text('{"Remembering": ')
    with tracker(tmp_path, "Remembering", resume=True):
        pass
    assert [call[3] for call in CALLS if call[0] == "start"] == [None, None]
    assert own_trackers.Remembering.modules == ()
