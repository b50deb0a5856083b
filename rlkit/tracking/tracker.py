"""The one object through which a run reports: times, metrics, samples, warnings."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from rlkit.config.tracking import TENSORBOARD, TrackingConfig
from rlkit.experience import Group
from rlkit.experience.scores import total_reward
from rlkit.trackers.base import Status
from rlkit.trackers.delivery import Deliveries
from rlkit.trackers.rows import texts_are_due
from rlkit.tracking.console import open_console
from rlkit.tracking.logs import CapturedOutput, ShowWarnings
from rlkit.tracking.progress import Progress, ShownSample, duration, evaluation_line, step_line
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.samples import best_and_worst_samples, transcript, widest_group


class Tracker:
    """Used only by the driver, from any of its threads.

    >>> with Tracker(config.tracking, RunFolder(config.run_dir), total_steps=100) as tracker:
    ...     tracker.phase("starting Ray")
    ...     with tracker.timed("generate"):
    ...         ...
    ...     tracker.step(1, {"reward/mean": 0.5}, groups)

    While it is open, the output of libraries goes to `logs/driver.log` (unless `capture_output=False`), and warnings
    logged under the name `rlkit` are shown.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        total_steps: int,
        capture_output: bool = True,
        clock: Callable[[], float] = time.monotonic,
        first_step: int = 1,
    ) -> None:
        """`first_step`: above 1 for a resumed run (plots drop what was written from this step on before)."""
        self.folder = folder
        self._tracked = {tracker.kind for tracker in config.trackers}
        self._clock = clock
        self._progress = Progress(total_steps, clock)
        self._times: dict[str, float] = {}
        self._step_began: float | None = None
        self._evaluating = 0.0
        self._status: Status = "failed"
        with ExitStack() as opened:  # closes what was opened, in reverse, if a later part fails
            opened.callback(folder.close)
            terminal = sys.stdout
            if capture_output:
                terminal = opened.enter_context(CapturedOutput(folder.logs / "driver.log")).terminal
            self._console = open_console(config.console, self._progress, folder.logs, terminal, str(folder.path))
            opened.callback(self._console.close)
            self._trackers = Deliveries(config.trackers, folder.path, first_step, self.message)
            folder.sample_reader = self._texts
            opened.callback(lambda: self._trackers.close(self._status))
            handler = ShowWarnings(self.warn)
            for name in ("rlkit", "algorithms"):
                logging.getLogger(name).addHandler(handler)
                opened.callback(logging.getLogger(name).removeHandler, handler)
            opened.callback(folder.writer.settle)  # its failures are still shown
            self._opened = opened.pop_all()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._status = "finished"
            elif self._status != "finished":
                self.message(f"The run ended early, after step {self._progress.step}.")  # its caller names the cause
                if isinstance(error, Exception):
                    cause = f"{type(error).__name__}: {error}"
                    self._trackers.alert("error", f"{self.folder.path.name} ended early", cause)
                else:
                    self._status = "stopped"
        finally:  # also on a full disk, or else the cause would go to the captured output
            self.close()

    def resume(self, step: int, headline: str, heldout: Mapping[int, float]) -> None:
        """Continue after `step` steps of an earlier run, with the `headline` metric of its evaluations."""
        with self._progress.lock:
            self._progress.resume(step, headline, heldout)

    def total_steps(self, steps: int) -> None:
        """Set the run's number of steps, if it became known only with the data."""
        with self._progress.lock:
            self._progress.total_steps = steps

    def message(self, text: str) -> None:
        self._console.notice(text)

    def phase(self, name: str, parallel: bool = False) -> None:
        """Begin a phase of the start-up and end earlier ones, unless it runs in parallel."""
        with self._progress.lock:
            self._progress.begin_phase(name, parallel)
        self._console.line(name)

    def phase_done(self, name: str) -> None:
        """End a phase. Phases not named here end when the next one begins, or with the first step."""
        with self._progress.lock:
            seconds = self._progress.end_phase(name)
        self._console.line(f"{name}: done in {duration(seconds)}")

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the body's seconds to `time/<phase>` of the current step (`evaluate`: of the next evaluation)."""
        began = self._clock()
        with self._progress.lock:
            if phase != "evaluate":
                self._progress.training_begins()
                if self._step_began is None:
                    self._step_began, self._evaluating = began, 0.0
            self._progress.activities[phase] = began
        try:
            yield
        finally:
            with self._progress.lock:
                self._progress.activities.pop(phase, None)
                seconds = self._clock() - began
                self._times[phase] = self._times.get(phase, 0.0) + seconds
                if phase == "evaluate":
                    self._evaluating += seconds

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group] = (),
    ) -> None:
        """Record and show the metrics of a training step. Raises TypeError that names a metric that is not a number."""
        with self._progress.lock:
            now = self._clock()
            times = {f"time/{phase}": seconds for phase, seconds in self._times.items() if phase != "evaluate"}
            self._times = {phase: seconds for phase, seconds in self._times.items() if phase == "evaluate"}
            if self._step_began is not None:
                # From the end of the previous step, so that nothing but evaluations is left out.
                times["time/step"] = now - self._step_began - self._evaluating
            self._step_began, self._evaluating = now, 0.0
            values = _numbers(times | dict(metrics))
            self._progress.end_step(step, values)
            shown = widest_group(groups)
            if shown is not None:
                self._progress.sample = _shown(shown)
            line = step_line(self._progress)
        self._write("step", step, values)
        self._console.line(line)

    def evaluation(self, step: int, headline: str, metrics: Mapping[str, float]) -> None:
        """Record a held-out evaluation after `step` steps (0: before training). `headline`: the metric to show."""
        with self._progress.lock:
            times = {"time/evaluate": self._times.pop("evaluate")} if "evaluate" in self._times else {}
            values = _numbers(times | dict(metrics))
            self._progress.end_evaluation(step, headline, values)
            line = evaluation_line(self._progress)
        self._write("evaluation", step, values)
        self._console.line(line)

    def warn(self, message: str) -> None:
        """Show a warning. Repeats are counted, and shown the 10th, 100th, ... time."""
        with self._progress.lock:
            count = self._progress.add_warning(message)
        if str(count).strip("0") == "1":
            self._trackers.alert("warn", f"{self.folder.path.name}: warning", message)
            self._console.line(f"warning: {message}" + (f" ({count} times by now)" if count > 1 else ""))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.folder.write_summary(summary)
        self._console.summary(summary, self.folder.path, TENSORBOARD in self._tracked)
        self._status = "finished"

    def close(self) -> None:
        """Close the files and restore the terminal; may be called again."""
        self._opened.close()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        version, now = values.get("weights/version"), time.time()
        record = {
            "kind": kind,
            "step": step,
            "policy_version": None if version is None else int(version),
            "time": now,
            "seconds": round(self._progress.elapsed, 3),
            **values,
        }
        self.folder.append_metrics(record)
        self._trackers.scalars(step, values, now)

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        step = int(rows[0]["step"])
        if texts_are_due(step, self._progress.total_steps):
            self._trackers.samples(step, rows)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {name!r} must be a number, not {value!r}") from error
    return numbers


def _shown(group: Group) -> list[ShownSample]:
    prompt = next((m.content for m in reversed(group.prompt.messages) if m.role == "user"), "")
    return [
        ShownSample(rank, prompt, transcript(sample), total_reward(score), score.reason)
        for rank, sample, score in best_and_worst_samples(group)
    ]
