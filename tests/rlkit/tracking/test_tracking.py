"""What a run writes and shows, with real files; test_tracking_processes.py has whole processes and terminals."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from rlkit.config.tracking import TrackingConfig
from rlkit.tracking import RunFolder, RunFolderError, Tracker
from rlkit.tracking.console import PlainConsole
from rlkit.tracking.progress import Progress, ShownSample, curve, duration, printable, sparkline
from rlkit.tracking.run_folder import json_text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def tracker(tmp_path: Path, steps: int = 10, clock: Callable[[], float] = time.monotonic, **keys: Any) -> Tracker:
    config = TrackingConfig(**{"console": "off", "tensorboard": False, **keys})
    return Tracker(config, RunFolder(tmp_path / "run"), steps, capture_output=False, clock=clock)


# the run folder


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "run").close()
    with pytest.raises(RunFolderError, match=r"already holds a run \(metrics.jsonl"):
        RunFolder(tmp_path / "a" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder(tmp_path / "file")


def test_each_metrics_line_is_on_disk_at_once_and_not_finite_numbers_do_not_break_it(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.step(1, {"policy/loss": math.nan, "policy/grad_norm": math.inf, "kl/rollout": np.float32(0.5)})
        t.step(2, {"policy/loss": -math.inf, "weights/version": np.int64(2)})
        first, second = lines_of(t.folder.metrics)
    assert (first["kind"], first["step"], first["policy_version"]) == ("step", 1, None)
    assert (first["policy/loss"], first["policy/grad_norm"], first["kl/rollout"]) == ("NaN", "Infinity", 0.5)
    assert (second["policy/loss"], second["policy_version"]) == ("-Infinity", 2)


def test_a_metric_that_is_no_number_is_named(tmp_path: Path) -> None:
    with tracker(tmp_path) as t, pytest.raises(TypeError, match="reward/mean"):
        t.step(1, {"reward/mean": "high"})  # type: ignore[dict-item]


def test_summary_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_summary({"steps": 3, "reward": np.float64("nan"), "folder": tmp_path})
    assert json.loads(folder.summary.read_text()) == {"steps": 3, "reward": "NaN", "folder": str(tmp_path)}
    with pytest.raises(TypeError, match="object"):
        folder.write_summary({"steps": object()})
    assert json.loads(folder.summary.read_text())["steps"] == 3
    assert [p.name for p in folder.path.iterdir() if p.name.startswith(".")] == []


def test_files_that_grow_are_cut_back_to_what_a_checkpoint_knew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.append_metrics({"step": 1})
    folder.append_table("starc", [{"step": 1, "starc/distance": 0.5}])
    sizes = folder.sizes()
    assert sizes.keys() == {"metrics.jsonl", "samples.jsonl", "diagnostics/starc.jsonl"}
    folder.append_metrics({"step": 2})
    folder.append_table("starc", [{"step": 2}, {"step": 2}])
    folder.append_table("drift", [{"step": 2}])
    folder.close()
    again = RunFolder(tmp_path / "run", resume=True)
    again.keep_only(sizes)
    assert lines_of(again.metrics) == [{"step": 1}]
    assert lines_of(again.tables / "starc.jsonl") == [{"step": 1, "starc/distance": 0.5}]
    assert lines_of(again.tables / "drift.jsonl") == []
    again.keep_only({})
    assert lines_of(again.tables / "starc.jsonl") == []


def test_json_text_survives_what_models_write() -> None:
    assert json.loads(json_text({"t": 'a\ud83d"\n\x00 £'})) == {"t": 'a?"\n\x00 £'}


# times


def test_times_add_up_and_leave_evaluations_out(tmp_path: Path) -> None:
    clock = Clock()
    with tracker(tmp_path, clock=clock) as t:

        def spend(phase: str, seconds: float) -> None:
            with t.timed(phase):
                clock.now += seconds

        clock.now += 50  # start-up
        spend("evaluate", 8)
        t.evaluation(0, "accuracy/heldout", {"accuracy/heldout": 0.25})
        for step in (1, 2):
            spend("generate", 2)
            spend("generate", 1)
            spend("update", 4)
            clock.now += 0.5  # belongs to no phase
            t.step(step, {})
            spend("evaluate", 8)
            t.evaluation(step, "accuracy/heldout", {"accuracy/heldout": 0.5})
        records = lines_of(t.folder.metrics)
        assert t._progress.seconds_left == pytest.approx(8 * (7.5 + 8 + 7.5) / 2 - 8)
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["time/evaluate"] for r in evaluations] == [8, 8, 8]
    assert [r["accuracy/heldout"] for r in evaluations] == [0.25, 0.5, 0.5]
    assert [(r["time/generate"], r["time/update"], r["time/step"]) for r in steps] == [(3, 4, 7.5), (3, 4, 7.5)]
    assert all("time/evaluate" not in r for r in steps)


def test_a_phase_that_raises_is_still_timed(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        with pytest.raises(KeyError), t.timed("score"):
            raise KeyError
        t.step(1, {})
        assert lines_of(t.folder.metrics)[0]["time/score"] >= 0
        assert t._progress.now_doing == ""


# TensorBoard


def test_tensorboard_off_writes_nothing_and_nothing_imports_torch(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.step(1, {"reward/mean": 1.0})
    assert not (tmp_path / "run" / "tensorboard").exists()
    code = (
        "import sys; from rlkit.trackers.tensorboard import TensorBoardWriter; from pathlib import Path;"
        f"w = TensorBoardWriter(Path({str(tmp_path)!r})); w.scalars(1, {{'a/b': 1.0}}); w.close();"
        "import rlkit.tracking; print({'torch', 'tensorflow', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


# drawings and the view


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60), st.integers(1, 30))
def test_sparkline_never_fails_nor_exceeds_its_width(values: list[float], width: int) -> None:
    finite_sum = [v if abs(v) < 1e300 else math.nan for v in values]
    assert len(sparkline(finite_sum, width)) == min(width, len(values))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(20, 100), st.integers(4, 20))
def test_curve_fits_its_width(values: list[float], width: int, height: int) -> None:
    lines = curve([(25 * i, v) for i, v in enumerate(values)], width, height)
    if width < 30:
        assert lines == []
        return
    assert len(lines) == height + 2
    assert max(map(len, lines)) <= width
    assert any("●" in line for line in lines)


def test_curve_and_sparkline_show_the_shape() -> None:
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert sparkline([1, 1], 4) == "▁▁"
    assert sparkline([], 4) == ""
    lines = curve([(0, 0.0), (10, 1.0)], 40, 5)
    assert lines[0].endswith("●")
    assert "100.0%" in lines[0]
    assert "●" in lines[4].split("┤")[1][:1]
    assert curve([(0, 0.5)], 40, 5) == []
    assert curve([(0, 0.5), (0, 0.6)], 40, 5) == []
    assert (duration(4.21), duration(187), duration(7387)) == ("4.2 s", "3:07 min", "2:03:07 h")
    assert "\x1b" not in printable("a\x1b[31m\nb")
    assert printable("a\n  b") == "a b"


@pytest.mark.parametrize("step", [None, 0, 80])
@pytest.mark.parametrize("size", [(140, 50), (80, 24), (50, 16), (30, 8), (8, 3)])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_view_fits_any_terminal(step: int | None, size: tuple[int, int], encoding: str) -> None:
    from rich.console import Console

    from rlkit.tracking.console import View

    clock = Clock()
    progress = Progress(160, clock)
    progress.begin_phase("starting Ray", parallel=False)
    progress.begin_phase("loading vLLM", parallel=False)
    if step is not None:
        progress.end_evaluation(0, "accuracy/heldout", {"accuracy/heldout": 0.31})
        progress.training_begins()
        for s in range(1, step + 1):
            clock.now += 0.4
            metrics = {"reward/mean": math.sin(s), "policy/grad_norm": math.nan, "time/step": 0.4, "time/update": 0.2}
            progress.end_step(s, metrics)
        progress.end_evaluation(step, "accuracy/heldout", {"accuracy/heldout": 0.5})
        progress.activities["generate"] = clock.now
        progress.add_warning("[bold]timed out\x1b[0m " + "x" * 300)
        progress.sample = [
            ShownSample("best", "q [red]" * 9, "#### 8 " * 90, 1.0, ""),
            ShownSample("worst", "", "", None, "t"),
        ]
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict" if encoding == "utf-8" else "replace")
    width, height = size
    console = Console(file=buffer, width=width, height=height, force_terminal=True, color_system=None)
    console.print(View(progress, "/runs/[x]"))
    buffer.seek(0)
    lines = buffer.read().splitlines()
    assert max(map(len, lines)) <= width
    if height >= 8:
        assert len(lines) < height
    if width >= 50 and step is None:
        assert any("loading vLLM" in line for line in lines)
    if width >= 50 and step == 80:
        assert any("80/160" in line for line in lines)
        assert any("50.0%" in line for line in lines)
    assert not any("\x1b[31m" in line for line in lines)


def test_plain_console_gives_signs_of_life(tmp_path: Path) -> None:
    progress, terminal = Progress(10, time.monotonic), io.StringIO()
    progress.begin_phase("loading vLLM", parallel=False)
    console = PlainConsole(progress, tmp_path / "console.log", terminal, heartbeat_seconds=0.05)
    try:
        deadline = time.monotonic() + 5
        while "loading vLLM" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        console.close()
    assert terminal.getvalue().startswith("... loading vLLM (")
    assert "... loading vLLM (" in (tmp_path / "console.log").read_text()


def test_repeated_warnings_are_counted_not_repeated(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        for _ in range(25):
            t.warn("the reward timed out")
        said = [line for line in (t.folder.logs / "console.log").read_text().splitlines() if "timed out" in line]
    assert len(said) == 2
    assert said[1].endswith("(10 times by now)")


def test_a_reward_is_no_share(tmp_path: Path) -> None:
    """The screen, the summary and the curve of evaluations that say neither right nor wrong, and of further sets."""
    with tracker(tmp_path) as t:
        for step, value in ((0, -1.5), (4, 120.25)):
            t.evaluation(step, "reward/heldout", {"reward/heldout": value, "evaluation/code/reward": value / 2})
        t.finish({"headline": "reward/heldout", "reward_before": -1.5, "reward_after": 120.25, "steps": 4})
    log = (tmp_path / "run" / "logs" / "console.log").read_text()
    assert "held-out reward 120.250 after step 4  (+121.750 since step 0)  code reward 60.125" in log
    assert re.search(r"held-out reward +-1.500 → 120.250 \(\+121.750\)", log)
    assert re.search(r"code reward +60.125", log)
    assert "%" not in log and "accuracy" not in log
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[1]["reward/heldout"] == 120.25


def test_the_accuracy_of_a_set_is_a_share(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.evaluation(0, "accuracy/heldout", {"accuracy/heldout": 0.5, "evaluation/math/accuracy": 0.25})
    log = (tmp_path / "run" / "logs" / "console.log").read_text()
    assert "held-out accuracy  50.0% after step 0  math accuracy 25.0%" in log


def test_the_line_of_a_step_says_how_preferences_and_imitation_go(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.step(1, {"preference/loss": 0.5, "policy/loss": 0.75, "preference/accuracy": 0.8, "preference/margin": 1.5})
        t.evaluation(1, "preference/heldout_accuracy", {"preference/heldout_accuracy": 0.625})
    with tracker(tmp_path / "imitation") as t:
        t.step(1, {"policy/loss": 2.25})
        t.step(2, {"policy/loss": 2.25, "reward/mean": 0.5})
    log = (tmp_path / "run" / "logs" / "console.log").read_text()
    assert re.search(r"loss +0.500  pairs right +80.0%  margin +1.500", log)
    assert "0.75" not in log
    assert "held-out accuracy  62.5% after step 1" in log
    first, second = re.findall(r"step +\d/.*", (tmp_path / "imitation" / "run" / "logs" / "console.log").read_text())
    assert "loss  2.250" in first
    assert "loss" not in second


@given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=30), st.integers(30, 100))
def test_a_curve_of_any_values_fits_its_width(values: list[float], width: int) -> None:
    lines = curve([(25 * i, v) for i, v in enumerate(values)], width, 9, shares=False)
    assert len(lines) == 11
    assert max(map(len, lines)) <= width
