"""The real packages, offline: what a run that fails and is resumed leaves in each."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_fixture import need
from paths import ROOT

RUN = ROOT / "tests" / "fixtures" / "tracked_run.py"
BLOCK = 32768


def commands(tmp_path: Path, *lines: list[str]) -> None:
    """Each in a process of its own, with nothing of the user's."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW", "SWAN"))
    }
    environment |= {
        "HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'fixtures'}",
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "board"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "HF_HUB_OFFLINE": "1",
    }
    for line in lines:
        done = subprocess.run(
            [sys.executable, *line], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr


def failed_and_resumed(tmp_path: Path, kind: str) -> Path:
    run = tmp_path / "run"
    commands(tmp_path, [str(RUN), kind, str(run)], [str(RUN), kind, str(run)])
    return run


def ledger(run: Path, kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((run / "trackers.json").read_text())[kind]
    return entry


def log_records(path: Path) -> Iterator[bytes]:
    """Of a log in LevelDB's format, which W&B and SwanLab write."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = BLOCK - at % BLOCK
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_trackio(tmp_path: Path) -> None:
    need("trackio")
    run = failed_and_resumed(tmp_path, "trackio")
    assert ledger(run, "trackio")["id"] == "run"
    with sqlite3.connect(tmp_path / "board" / "rlkit.db") as board:
        logged = [
            (step, json.loads(text)) for step, text in board.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
        alerts = list(board.execute("SELECT level, title, text FROM alerts"))
        ((name, config),) = list(board.execute("SELECT DISTINCT run_name, config FROM configs"))
        assert list(board.execute("SELECT COUNT(DISTINCT run_id) FROM metrics")) == [(1,)]
    rewards = [(step, row["reward/mean"], row.get("run/resumed_after")) for step, row in logged if "reward/mean" in row]
    assert rewards == [(1, 0.1, None), (2, 0.2, None), (3, 0.9, None), (3, 0.3, 2.0), (4, 0.4, 2.0)]
    assert (logged[0], logged[1][1]["policy/loss"]) == ((0, {"accuracy/heldout": 0.25}), "NaN")
    assert alerts == [
        ("warn", "run: warning", "the learner is tired"),
        ("error", "run ended early", "RuntimeError: out of luck"),
    ]
    assert (name, json.loads(config)["algorithm"]["epsilon"]) == ("run", 0.2)
    traces = [file.read_text() for file in (tmp_path / "board" / "traces").rglob("*.jsonl")]
    assert len(traces) == 5 * 4
    assert sum("step 2 g1 worst" in trace and "question g1" in trace for trace in traces) == 1


@pytest.mark.slow
def test_wandb(tmp_path: Path) -> None:
    need("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = failed_and_resumed(tmp_path, "wandb")
    first, second = sorted((run / "wandb").glob("offline-run-*"))
    assert {folder.name.rpartition("-")[2] for folder in (first, second)} == {ledger(run, "wandb")["id"]}
    history: list[dict[str, Any]] = []
    records = []
    for folder in (first, second):
        (file,) = folder.glob("*.wandb")
        records += [Record.FromString(data) for data in log_records(file)]
    for record in records:
        if record.HasField("history"):
            history.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
    rewards = [(r["step"], r["reward/mean"], r.get("run/resumed_after")) for r in history if "reward/mean" in r]
    assert rewards == [(1, 0.1, None), (2, 0.2, None), (3, 0.9, None), (3, 0.3, 2.0), (4, 0.4, 2.0)]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["time"] for line in lines} <= {row["_timestamp"] for row in history}
    alerts = [(r.alert.title, r.alert.level) for r in records if r.HasField("alert")]
    assert alerts == [("run: warning", "WARN"), ("run ended early", "ERROR")]
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1, 0]
    tables = [json.loads(file.read_text()) for file in sorted(second.rglob("*.table.json"))]
    assert sorted(row[2] for table in tables for row in table["data"]) == [
        f"step {step} {group} {rank}" for step in (3, 4) for group in ("g0", "g1") for rank in ("best", "worst")
    ]
    assert tables[0]["columns"][:4] == ["step", "prompt", "response", "answer"]


@pytest.mark.slow
def test_swanlab(tmp_path: Path) -> None:
    need("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    run = failed_and_resumed(tmp_path, "swanlab")
    first, second = sorted((run / "swanlog").glob("run-*"))
    known = ledger(run, "swanlab")["id"]
    scalars: list[tuple[str, int, float]] = []
    for folder in (first, second):
        assert folder.name.endswith(known)
        (file,) = folder.glob("*.swanlab")
        for record in map(Record.FromString, log_records(file)):
            if record.HasField("scalar"):
                scalars.append((record.scalar.key, record.scalar.step, record.scalar.value.number))
    assert [(step, value) for key, step, value in scalars if key == "reward/mean"] == [
        (1, 0.1), (2, 0.2), (3, 0.9), (3, 0.3), (4, 0.4)
    ]  # fmt: skip
    assert [(step, value) for key, step, value in scalars if key == "run/resumed_after"] == [(3, 2.0), (4, 2.0)]
    texts = [file.read_text() for file in first.rglob("media/**/*.txt")]
    assert "question g1\n\nstep 3 g1 worst" in texts and "the learner is tired" in texts


@pytest.mark.slow
def test_mlflow(tmp_path: Path) -> None:
    need("mlflow")
    import mlflow

    run = failed_and_resumed(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    known = ledger(run, "mlflow")["id"]
    stored = client.get_run(known)
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "run")
    assert stored.data.params["algorithm.epsilon"] == "0.2"
    history = client.get_metric_history(known, "reward/mean")
    assert [(one.step, one.value) for one in history] == [(1, 0.1), (2, 0.2), (3, 0.9), (3, 0.3), (4, 0.4)]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {int(line["time"] * 1000) for line in lines if "reward/mean" in line} <= {one.timestamp for one in history}
    assert [one.value for one in client.get_metric_history(known, "run/resumed_after")] == [2.0, 2.0]
    assert [one.step for one in client.get_metric_history(known, "evaluation/pass_4")] == [1, 2, 3, 3, 4]
    table = json.loads(Path(client.download_artifacts(known, "samples.json")).read_text())
    assert [row[:3] for row in table["data"][:2]] == [
        [1, "question g1", "step 1 g1 best"],
        [1, "question g1", "step 1 g1 worst"],
    ]
    alerts = sorted(item.path for item in client.list_artifacts(known, "alerts"))
    said = [Path(client.download_artifacts(known, path)).read_text() for path in alerts]
    assert said == ["warn: run: warning\nthe learner is tired\n", "error: run ended early\nRuntimeError: out of luck\n"]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = failed_and_resumed(tmp_path, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("reward/mean")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]
    assert [(e.step, e.value) for e in events.Scalars("accuracy/heldout")] == [(0, 0.25)]
    texts = [(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors("samples/worst")]
    assert [step for step, _ in texts] == [1, 2, 3, 3, 4]  # TensorBoard drops numbers of the ended attempt, not texts
    assert all(b"question g1" in text and b"step %d g1 worst" % step in text for step, text in texts)
