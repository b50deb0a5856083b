"""Output of a reward training: metrics.jsonl, samples.jsonl, TensorBoard, console."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from rlkit.trackers.tensorboard import TensorBoardWriter
from rlkit.tracking.console import PlainConsole
from rlkit.tracking.logs import CapturedOutput, ShowWarnings
from rlkit.tracking.progress import Progress, duration
from rlkit.tracking.run_folder import RunFolder

_SECONDS_BETWEEN_LINES = 2.0
"""Steps that follow faster are only in metrics.jsonl."""


class RunReport:
    """The Report of rank 0. While it is open, the output of libraries goes to `logs/driver.log`."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._progress = Progress(1, time.monotonic)
        self._said = -_SECONDS_BETWEEN_LINES
        self._handler = ShowWarnings(self.warn)
        self._opened = ExitStack()

    def __enter__(self) -> RunReport:
        with ExitStack() as opened:
            opened.callback(self.folder.close)
            terminal = opened.enter_context(CapturedOutput(self.folder.logs / "driver.log")).terminal
            self._console = PlainConsole(self._progress, self.folder.logs / "console.log", terminal)
            opened.callback(self._console.close)
            self._tensorboard = TensorBoardWriter(self.folder.tensorboard)
            opened.callback(self._tensorboard.close)
            logging.getLogger("rlkit").addHandler(self._handler)
            opened.callback(logging.getLogger("rlkit").removeHandler, self._handler)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def phase(self, name: str) -> None:
        with self._progress.lock:
            self._progress.begin_phase(name, parallel=False)
        self._console.line(name)

    def begins(self, total_steps: int) -> None:
        with self._progress.lock:
            self._progress.total_steps = total_steps
            self._progress.training_begins()

    def __call__(self, step: int, **metrics: float) -> None:
        with self._progress.lock:
            if step:
                self._progress.end_step(step, metrics)
            left, total = self._progress.seconds_left, self._progress.total_steps
        self._write("step", step, metrics)
        now = time.monotonic()
        if step in (0, total) or now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            ending = f"  left {duration(left)}" if left else ""
            self._console.line(f"step {step:>{len(str(total))}}/{total}  {_shown(metrics)}{ending}")

    def evaluation(self, step: int, **metrics: float) -> None:
        self._write("evaluation", step, metrics)
        self._console.line(f"evaluation, step {step}: {_shown(metrics)}")

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.folder.append_samples(rows)

    def text(self, text: str) -> None:
        for line in text.splitlines():
            self._console.line(line)

    def warn(self, message: str) -> None:
        self._console.line(f"warning: {message}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.folder.write_summary(summary)
        numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float, str))}
        self._console.line(f"finished: {_shown(numbers)}")
        self._console.line(f"run folder {self.folder.path} (summary.json, metrics.jsonl, tensorboard/)")

    def _write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        seconds = round(self._progress.elapsed, 3)
        self.folder.append_metrics({"kind": kind, "step": step, "time": time.time(), "seconds": seconds, **values})
        self._tensorboard.scalars(step, values)


class SilentReport:
    def phase(self, name: str) -> None: ...
    def begins(self, total_steps: int) -> None: ...
    def __call__(self, step: int, **metrics: float) -> None: ...
    def evaluation(self, step: int, **metrics: float) -> None: ...
    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None: ...
    def text(self, text: str) -> None: ...
    def warn(self, message: str) -> None: ...


def _shown(metrics: Mapping[str, Any]) -> str:
    parts = []
    for name, value in metrics.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.rpartition('/')[2]} {text}")
    return "  ".join(parts)
