"""What a run says: lines for the transcript and plain consoles, and the consoles that show them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from rlkit.tracking.drawing import curve, duration, printable, sparkline
from rlkit.tracking.progress import Progress

Mode = Literal["auto", "live", "plain", "off"]

SHOWN = (
    ("reward", "reward/mean", "{:7.3f}"),
    ("accuracy", "accuracy/train", "{:6.1%}"),
    ("KL", "kl/reference", "{:8.5f}"),
    ("rollout KL", "kl/rollout", "{:8.6f}"),
    ("entropy", "policy/entropy", "{:6.3f}"),
    ("length", "length/mean", "{:6.1f}"),
    ("clipped", "policy/clip_share", "{:6.2%}"),
    ("grad", "policy/grad_norm", "{:7.3f}"),
)
"""(label, metric, format) of a step's line, in order; metrics that a run does not have are left out."""
PHASES = ("generate", "score", "update", "publish")
_HEARTBEAT_SECONDS = 20.0


def step_line(progress: Progress) -> str:
    """One aligned line about the step just done."""
    m, width = progress.metrics, len(str(progress.total_steps))
    parts = [f"step {progress.step:>{width}}/{progress.total_steps}"]
    hidden = {"kl/rollout"} if "kl/reference" in m else set()
    parts += [f"{label} {form.format(m[name])}" for label, name, form in SHOWN if name in m and name not in hidden]
    if m.get("reward/failed"):
        parts.append(f"failed rewards {m['reward/failed']:g}")
    if "time/step" in m:
        times = " ".join(f"{p} {m[f'time/{p}']:.2f}" for p in PHASES if f"time/{p}" in m)
        parts.append(f"{m['time/step']:6.2f} s" + (f" ({times})" if times else ""))
    if progress.seconds_left:
        parts.append(f"left {duration(progress.seconds_left)}")
    return "  ".join(parts)


def evaluation_line(progress: Progress) -> str:
    """One line about the evaluation just done."""
    (_, before), (step, now) = progress.accuracies[0], progress.accuracies[-1]
    line = f"held-out accuracy {now:6.1%} after step {step}"
    if len(progress.accuracies) > 1:
        line += f"  ({100 * (now - before):+.1f} points since step {progress.accuracies[0][0]})"
    return line


def summary_lines(
    progress: Progress, summary: Mapping[str, Any], folder: Path, tensorboard: bool, width: int, ascii_only: bool
) -> list[str]:
    """What a run came to: for the last panel and the transcript."""
    rows: list[tuple[str, str]] = []
    if summary.get("accuracy_before") is not None and summary.get("accuracy_after") is not None:
        before, after = float(summary["accuracy_before"]), float(summary["accuracy_after"])
        arrow = "->" if ascii_only else "→"
        rows.append(("held-out accuracy", f"{before:.1%} {arrow} {after:.1%} ({100 * (after - before):+.1f} points)"))
    if progress.rewards:
        rows.append(("reward", f"{sparkline(progress.rewards, 40, ascii_only)} {progress.rewards[-1]:.3f}"))
    seconds = float(summary.get("wall_seconds") or progress.elapsed)
    steps = f"{summary.get('steps', progress.step)} in {duration(seconds)}"
    if summary.get("seconds_per_step"):
        steps += f" ({duration(float(summary['seconds_per_step']))} each)"
    rows.append(("steps", steps))
    if summary.get("reward_failed"):
        rows.append(("failed rewards", f"{summary['reward_failed']:g}"))
    if progress.warnings:
        rows.append(("warnings", f"{sum(progress.warnings.values())} (see logs/console.log)"))
    rows.append(("run folder", str(folder)))
    if tensorboard:
        rows.append(("curves", f"tensorboard --logdir {folder / 'tensorboard'}"))
    lines = [f"{label:<18} {value}" for label, value in rows]
    drawn = curve(progress.accuracies, width, 9, ascii_only)
    return [*lines, "", "held-out accuracy", *drawn] if drawn else lines


class Console:
    """`off`: shows nothing. Whatever any console shows is also in the transcript, `logs/console.log`."""

    def __init__(self, progress: Progress, transcript: Path) -> None:
        self._progress = progress
        self._transcript = transcript.open("a", encoding="utf-8", buffering=1)

    def line(self, text: str) -> None:
        """Something routine happened (a step, a phase): a view that redraws itself shows it in its own way."""
        self._transcript.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def notice(self, text: str) -> None:
        """Something to be said in so many words."""
        self.line(text)

    def summary(self, summary: Mapping[str, Any], folder: Path, tensorboard: bool) -> None:
        """The run is over."""
        for line in summary_lines(self._progress, summary, folder, tensorboard, 72, ascii_only=False):
            self._transcript.write(line + "\n")

    def close(self) -> None:
        """Leave the terminal as it was; harmless when repeated."""
        self._transcript.close()


class PlainConsole(Console):
    """One line per event, and a sign of life where nothing happens for a while."""

    def __init__(
        self, progress: Progress, transcript: Path, terminal: TextIO, heartbeat_seconds: float = _HEARTBEAT_SECONDS
    ) -> None:
        super().__init__(progress, transcript)
        self._terminal = terminal
        self._heartbeat_seconds = heartbeat_seconds
        self._changed = threading.Condition()
        self._said = 0
        self._closed = False
        self._thread = threading.Thread(target=self._heartbeat, name="console heartbeat", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        with self._changed:
            self._said += 1
            self._changed.notify()
            self._say(text)

    def summary(self, summary: Mapping[str, Any], folder: Path, tensorboard: bool) -> None:
        super().summary(summary, folder, tensorboard)
        ascii_only = not _is_unicode(self._terminal)
        lines = summary_lines(self._progress, summary, folder, tensorboard, 72, ascii_only)
        with self._changed:
            self._terminal.write("\n" + "\n".join(lines) + "\n")
            self._terminal.flush()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)
        super().close()

    def _say(self, text: str) -> None:
        super().line(text)
        self._terminal.write(text + "\n")
        self._terminal.flush()

    def _heartbeat(self) -> None:
        while True:
            with self._changed:
                said = self._said
                spoken = self._changed.wait(self._heartbeat_seconds)
                if self._closed:
                    return
                if spoken or self._said != said:
                    continue
            with self._progress.lock:  # never while holding the condition: the tracker may speak with this lock held
                doing, elapsed = self._progress.now_doing, self._progress.elapsed
            with self._changed:
                if self._said == said and not self._closed:
                    self._say(f"... {doing or 'working'} ({duration(elapsed)} since the start)")


def open_console(mode: Mode, progress: Progress, logs: Path, terminal: TextIO, title: str) -> Console:
    """The console of this mode, already showing. `auto` is live on a terminal that can redraw, else plain."""
    transcript = logs / "console.log"
    if mode == "off":
        return Console(progress, transcript)
    if mode == "plain" or (mode == "auto" and not _can_redraw(terminal)):
        return PlainConsole(progress, transcript, terminal)
    from rlkit.tracking.live import LiveConsole

    return LiveConsole(progress, transcript, terminal, title)


def shown_reward(reward: float | None, reason: str) -> str:
    """A sample's reward in a word."""
    return f"{reward:.3f}" if reward is not None else f"invalid: {printable(reason)}"


def _can_redraw(terminal: TextIO) -> bool:
    return terminal.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _is_unicode(terminal: TextIO) -> bool:
    return (getattr(terminal, "encoding", None) or sys.getdefaultencoding()).lower().startswith("utf")
