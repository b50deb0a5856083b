"""Small drawings in text: durations, sparklines, a curve.

What is known of a run at this moment: pure state with an injected clock, from which consoles draw.

The live view: one screen that redraws itself, fitted to the size of the terminal.

What a run says: lines for the transcript and plain consoles, and the consoles that show them.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-~=+*#"
_NARROWEST_CURVE = 30


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07 min`, `2:03:07 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def printable(text: str) -> str:
    """One line without control characters: a model's output must not steer the terminal."""
    spaced = " ".join(text.split())
    return "".join(c if c.isprintable() else "�" for c in spaced)


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The values as bars, averaged into at most `width` of them; values that are not finite leave a gap."""
    bars = _ASCII_BARS if ascii_only else _BARS
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = []
    for start, end in pairwise(edges):
        finite = [v for v in values[start:end] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [m for m in means if not math.isnan(m)]
    if not known:
        return " " * count
    low, high = min(known), max(known)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(m) else bars[round((m - low) * scale)] for m in means)


def curve(points: Sequence[tuple[int, float]], width: int, height: int, ascii_only: bool = False) -> list[str]:
    """Lines of a plot of shares (0 to 1) over steps: measured points, joined by dots; empty if that is no curve."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2 or points[0][0] == points[-1][0] or width < _NARROWEST_CURVE:
        return []
    mark, dot, axis, corner, floor = ("o", ".", "|", "+", "-") if ascii_only else ("●", "·", "┤", "└", "─")
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high - low < 0.01:
        middle = min(max((low + high) / 2, 0.005), 0.995)
        low, high = middle - 0.005, middle + 0.005
    columns = width - 9
    first, last = points[0][0], points[-1][0]
    grid = [[" "] * columns for _ in range(height)]

    def row(y: float) -> int:
        return round((high - y) / (high - low) * (height - 1))

    def column(x: float) -> int:
        return round((x - first) / (last - first) * (columns - 1))

    for (x0, y0), (x1, y1) in pairwise(points):
        for c in range(column(x0), column(x1) + 1):
            share = (c - column(x0)) / max(column(x1) - column(x0), 1)
            grid[row(y0 + share * (y1 - y0))][c] = dot
    for x, y in points:
        grid[row(y)][column(x)] = mark
    lines = []
    for r, cells in enumerate(grid):
        labelled = r in (0, height - 1, (height - 1) // 2)
        label = f"{high - (high - low) * r / (height - 1):6.1%}" if labelled else " " * 6
        lines.append(f"{label:>7} {axis}{''.join(cells)}".rstrip())
    lines.append(" " * 8 + corner + floor * columns)
    left, right = f"step {first}", f"step {last}"
    lines.append(" " * 9 + left + right.rjust(columns - len(left)))
    return lines


_STEPS_TIMED = 20


@dataclass
class Phase:
    """Something the start-up waits for."""

    name: str
    began: float
    ended: float | None = None


@dataclass(frozen=True)
class ShownSample:
    """One response for people to read."""

    rank: str
    prompt: str
    response: str
    reward: float | None
    reason: str


class Progress:
    """Written by the tracker, read by the console's thread; both hold `lock`."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self.total_steps = total_steps
        self.clock = clock
        self.began = clock()
        self.phases: list[Phase] = []
        self.activities: dict[str, float] = {}
        """What goes on now, and since when."""
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.rewards: list[float] = []
        self.accuracies: list[tuple[int, float]] = []
        """Held-out accuracy by step."""
        self.warnings: dict[str, int] = {}
        """Message -> how often, the latest last."""
        self.sample: Sequence[ShownSample] = ()
        self._ends: deque[float] = deque(maxlen=_STEPS_TIMED + 1)

    def go_on_from(self, step: int, accuracies: Mapping[int, float]) -> None:
        """The run goes on after `step` steps of an earlier one."""
        self.step = step
        self.accuracies = sorted(accuracies.items())

    def begin_phase(self, name: str, parallel: bool) -> None:
        """A phase begins; earlier ones end, unless it runs beside them."""
        if not parallel:
            self.end_phases()
        self.phases.append(Phase(name, self.clock()))

    def end_phase(self, name: str) -> float:
        """A phase is over; seconds it took. Raises ValueError if none of that name is running."""
        for phase in self.phases:
            if phase.name == name and phase.ended is None:
                phase.ended = self.clock()
                return phase.ended - phase.began
        raise ValueError(f"no phase {name!r} is running")

    def end_phases(self) -> None:
        """All phases are over."""
        for phase in self.phases:
            if phase.ended is None:
                phase.ended = self.clock()

    def training_begins(self) -> None:
        """The first step begins now (the estimate of the time left counts from here)."""
        if not self._ends:
            self.end_phases()
            self._ends.append(self.clock())

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self.step = step
        self.metrics = self.metrics | dict(metrics)
        self._ends.append(self.clock())
        if "reward/mean" in metrics:
            self.rewards.append(metrics["reward/mean"])

    def end_evaluation(self, step: int, accuracy: float, metrics: Mapping[str, float]) -> None:
        """A held-out evaluation is done."""
        self.accuracies.append((step, accuracy))
        self.metrics = self.metrics | dict(metrics) | {"accuracy/heldout": accuracy}

    def add_warning(self, message: str) -> int:
        """How often this message has come by now."""
        count = self.warnings.pop(message, 0) + 1
        self.warnings[message] = count
        return count

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """From the pace of the last steps, evaluations between them included; None before the first step is done."""
        if len(self._ends) < 2:
            return None
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0.0, pace * (self.total_steps - self.step) - (self.clock() - self._ends[-1]))

    @property
    def now_doing(self) -> str:
        """`generate`, or the phases still running, in words; empty if nothing is known to go on."""
        if self.activities:
            return ", ".join(self.activities)
        return ", ".join(phase.name for phase in self.phases if phase.ended is None)


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

    return LiveConsole(progress, transcript, terminal, title)


def shown_reward(reward: float | None, reason: str) -> str:
    """A sample's reward in a word."""
    return f"{reward:.3f}" if reward is not None else f"invalid: {printable(reason)}"


def _can_redraw(terminal: TextIO) -> bool:
    return terminal.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _is_unicode(terminal: TextIO) -> bool:
    return (getattr(terminal, "encoding", None) or sys.getdefaultencoding()).lower().startswith("utf")


_REDRAWS_PER_SECOND = 2
_FRAMED = 50
_WIDE = 90
_WARNINGS_SHOWN = 3
_LINES_PER_WARNING = 2
_LEFT_COLUMNS = 52


class LiveConsole(Console):
    """Redraws from Progress twice a second; lines go to the transcript alone."""

    def __init__(self, progress: Progress, transcript: Path, terminal: TextIO, title: str) -> None:
        super().__init__(progress, transcript)
        self._rich = _TerminalConsole(file=terminal, highlight=False, markup=False, emoji=False)
        self._live = Live(
            get_renderable=lambda: view(progress, title, self._rich.options),
            console=self._rich,
            refresh_per_second=_REDRAWS_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)

    def notice(self, text: str) -> None:
        super().notice(text)
        self._rich.print(Text(text))  # above the view, and there to stay

    def summary(self, summary: Mapping[str, Any], folder: Path, tensorboard: bool) -> None:
        super().summary(summary, folder, tensorboard)
        self._live.transient = True  # the panel takes the view's place
        self._live.stop()
        width = min(self._rich.width, 100) - 4
        lines = summary_lines(self._progress, summary, folder, tensorboard, width, self._rich.options.ascii_only)
        self._rich.print(Panel(Text("\n".join(lines)), title="finished", border_style="green", width=width + 4))

    def close(self) -> None:
        self._live.stop()
        super().close()


class _TerminalConsole(RichConsole):
    """Asks its own file for its size: descriptors 1 and 2, which rich would ask, are redirected to a log."""

    @property
    def size(self) -> ConsoleDimensions:
        try:
            found = os.get_terminal_size(self.file.fileno())
        except OSError:
            return super().size
        if found.columns < 1 or found.lines < 1:
            return super().size
        return ConsoleDimensions(found.columns, found.lines)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


def view(progress: Progress, title: str, options: ConsoleOptions) -> RenderableType:
    """The whole view at this moment."""
    with progress.lock:
        width, height, ascii_only = options.max_width, options.size.height, options.ascii_only
        parts: list[RenderableType] = [_head(progress, width)]
        room = (
            height - (2 if width < _FRAMED else 4) - 1
        )  # below the head and inside the frame, and a line for the cursor
        if progress.step == 0:
            shown = progress.phases[-max(room - 4, 1) :]
            parts.append(_phases(progress, shown, ascii_only))
            room -= len(shown)
        if progress.step or progress.accuracies:
            body, lines = _body(progress, width, room, ascii_only)
            parts.append(body)
            times = [
                f"{name} {progress.metrics[f'time/{name}']:.2f}"
                for name in PHASES
                if f"time/{name}" in progress.metrics
            ]
            if times and room > lines:
                parts.append(Text("seconds: " + ", ".join(times), style="dim", no_wrap=True, overflow="ellipsis"))
                lines += 1
            room -= lines
        warnings = list(progress.warnings.items())[-_WARNINGS_SHOWN:]
        warnings = warnings[-max(room // _LINES_PER_WARNING, 0) :] if room >= _LINES_PER_WARNING else []
        if warnings:
            parts += [_warning(message, count) for message, count in warnings]
            room -= _LINES_PER_WARNING * len(warnings)
        if progress.sample and room >= 3:
            parts.append(_samples(progress, room))
        if width < _FRAMED:
            return Group(*parts)
        return Panel(Group(*parts), title=Text(title, style="bold"), border_style="blue", width=min(width, 120))


def _head(progress: Progress, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 1), expand=True)
    cells: list[RenderableType] = [Text(f"step {progress.step}/{progress.total_steps}", style="bold", no_wrap=True)]
    line.add_column(no_wrap=True)
    if width >= 60:
        line.add_column(ratio=1)
        cells.append(ProgressBar(total=progress.total_steps, completed=progress.step))
    line.add_column(no_wrap=True, justify="right")
    left = progress.seconds_left
    cells.append(Text(duration(progress.elapsed) + ("" if left is None else f", left about {duration(left)}")))
    line.add_row(*cells)
    now = [f"{name} {duration(progress.clock() - since)}" for name, since in progress.activities.items()]
    return Group(line, Text(", ".join(now) or progress.now_doing or "waiting", style="dim", no_wrap=True))


def _phases(progress: Progress, phases: list[Any], ascii_only: bool) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    done, running = ("ok", "..") if ascii_only else ("✓", "…")
    for phase in phases:
        over = phase.ended is not None
        seconds = (phase.ended if over else progress.clock()) - phase.began
        style = "green" if over else "yellow"
        table.add_row(Text(done if over else running, style=style), Text(phase.name), Text(duration(seconds)))
    return table


def _body(progress: Progress, width: int, room: int, ascii_only: bool) -> tuple[RenderableType, int]:
    metrics = _metrics(progress, ascii_only, max(room, 2))
    if width < _WIDE:
        return metrics, metrics.row_count
    grid = Table.grid(padding=(0, 4))
    grid.add_column()
    grid.add_column()
    inner = min(width, 120) - 4
    plot = curve(progress.accuracies, inner - _LEFT_COLUMNS, 8, ascii_only)
    right: RenderableType = Text("\n".join(["held-out accuracy", *plot]) if plot else "")
    grid.add_row(metrics, right)
    return grid, max(metrics.row_count, len(plot) + 1)


def _metrics(progress: Progress, ascii_only: bool, rows: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    m = progress.metrics
    lines: list[tuple[str, Text, str]] = []
    if progress.accuracies:
        now, since = progress.accuracies[-1][1], progress.accuracies[0][1]
        change = f"{100 * (now - since):+.1f} points" if len(progress.accuracies) > 1 else ""
        lines.append(("held-out accuracy", Text(f"{now:.1%}", style="bold"), change))
    for label, name, form in SHOWN:
        if name in m:
            style = "" if math.isfinite(m[name]) else "bold red"
            line = sparkline(progress.rewards, 16, ascii_only) if name == "reward/mean" else ""
            lines.append((label, Text(form.format(m[name]).strip(), style=style), line))
    if m.get("reward/failed"):
        lines.append(("failed rewards", Text(f"{m['reward/failed']:g}", style="bold red"), ""))
    if "time/step" in m:
        lines.append(("seconds per step", Text(f"{m['time/step']:.2f}"), ""))
    if "tokens/per_second" in m:
        lines.append(("tokens per second", Text(f"{m['tokens/per_second']:,.0f}"), ""))
    for label, value, extra in lines[:rows]:
        table.add_row(label, value, Text(extra))
    return table


def _warning(message: str, count: int) -> RenderableType:
    times = f" (x{count})" if count > 1 else ""
    return _Cut(f"warning: {printable(message)}{times}", _LINES_PER_WARNING, "yellow")


def _samples(progress: Progress, room: int) -> RenderableType:
    """The prompt on one line; a response may take what room there is, up to three lines each."""
    lines = max(1, min(3, (room - 3) // 2))
    texts = [_Cut(f"Q: {printable(progress.sample[0].prompt)}", 1, "dim")]
    for sample in progress.sample:
        style = {"best": "green", "worst": "red"}.get(sample.rank, "")
        head = f"{sample.rank} ({shown_reward(sample.reward, sample.reason)}): "
        texts.append(_Cut(head + printable(sample.response), lines, style))
    return Group(*texts)


class _Cut:
    """A text cut to so many lines of whatever width it gets."""

    def __init__(self, text: str, lines: int, style: str) -> None:
        self._text, self._lines, self._style = text, lines, style

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Any:
        text = Text(self._text, style=self._style)
        text.truncate(self._lines * options.max_width - 8, overflow="ellipsis")
        wrapped = text.wrap(console, options.max_width)[: self._lines]
        yield from wrapped


Mode = Literal["auto", "live", "plain", "off"]
