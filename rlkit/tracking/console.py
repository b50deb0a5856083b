"""Consoles that show a run: live (redraws itself), plain (a line per event), off (only the transcript)."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment, SegmentLines
from rich.table import Table
from rich.text import Text

from rlkit.tracking.progress import (
    PHASES,
    Phase,
    Progress,
    change_text,
    curve,
    duration,
    headline_text,
    is_share,
    printable,
    shown,
    sparkline,
    summary_lines,
    value_text,
)

Mode = Literal["auto", "live", "plain", "off"]
HEARTBEAT_SECONDS = 20.0
REDRAWS_PER_SECOND = 2
SUMMARY_COLUMNS = 72
WIDEST = 120
FRAMED, WITH_BAR, WITH_CURVE = 50, 60, 90
"""Minimum terminal columns for a frame, a progress bar and a curve."""
METRIC_COLUMNS = 52


class Console:
    """Shows nothing (`off`). Everything that a console shows is also in the transcript, `logs/console.log`."""

    def __init__(self, progress: Progress, transcript: Path) -> None:
        self._progress = progress
        self._transcript = transcript.open("a", encoding="utf-8", buffering=1)

    def line(self, text: str) -> None:
        """Report something routine (a step, a phase), which a live view shows in its own way."""
        self._transcript.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def notice(self, text: str) -> None:
        """Show a text verbatim in every console."""
        self.line(text)

    def summary(self, summary: Mapping[str, Any], folder: Path, tensorboard: bool) -> None:
        lines = summary_lines(self._progress, summary, folder, tensorboard, SUMMARY_COLUMNS, ascii_only=False)
        self._transcript.write("\n".join(lines) + "\n")

    def close(self) -> None:
        self._transcript.close()


class PlainConsole(Console):
    """One line per event, and a sign of life after a quiet period."""

    def __init__(
        self, progress: Progress, transcript: Path, terminal: TextIO, heartbeat_seconds: float = HEARTBEAT_SECONDS
    ) -> None:
        super().__init__(progress, transcript)
        self._terminal = terminal
        self._heartbeat_seconds = heartbeat_seconds
        self._changed = threading.Condition()
        self._lines = 0
        self._closed = False
        self._thread = threading.Thread(target=self._heartbeat, name="console heartbeat", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        with self._changed:
            super().line(text)
            self._show(text)
            self._lines += 1
            self._changed.notify()

    def summary(self, summary: Mapping[str, Any], folder: Path, tensorboard: bool) -> None:
        super().summary(summary, folder, tensorboard)
        encoding = getattr(self._terminal, "encoding", None) or sys.getdefaultencoding()
        ascii_only = not encoding.lower().startswith("utf")
        with self._changed:
            lines = summary_lines(self._progress, summary, folder, tensorboard, SUMMARY_COLUMNS, ascii_only)
            self._show("\n" + "\n".join(lines))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)
        super().close()

    def _show(self, text: str) -> None:
        self._terminal.write(text + "\n")
        self._terminal.flush()

    def _heartbeat(self) -> None:
        while True:
            with self._changed:
                lines = self._lines
                self._changed.wait(self._heartbeat_seconds)
                if self._closed:
                    return
                if self._lines != lines:
                    continue
            with self._progress.lock:  # never while holding the condition: the tracker may report with this lock held
                doing, elapsed = self._progress.now_doing, self._progress.elapsed
            with self._changed:
                if self._lines == lines and not self._closed:
                    self.line(f"... {doing or 'working'} ({duration(elapsed)} since the start)")


class LiveConsole(Console):
    """A view of Progress, redrawn twice a second; lines go only to the transcript."""

    def __init__(self, progress: Progress, transcript: Path, terminal: TextIO, title: str) -> None:
        super().__init__(progress, transcript)
        self._rich = _Terminal(file=terminal, highlight=False, markup=False, emoji=False)
        self._live = Live(
            View(progress, title),
            console=self._rich,
            refresh_per_second=REDRAWS_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)

    def notice(self, text: str) -> None:
        super().notice(text)
        self._rich.print(Text(text))  # stays above the view

    def summary(self, summary: Mapping[str, Any], folder: Path, tensorboard: bool) -> None:
        super().summary(summary, folder, tensorboard)
        self._live.transient = True  # the panel takes the view's place
        self._live.stop()
        width, ascii_only = min(self._rich.width, 100), self._rich.options.ascii_only
        lines = summary_lines(self._progress, summary, folder, tensorboard, width - 4, ascii_only)
        self._rich.print(Panel(Text("\n".join(lines)), title="finished", border_style="green", width=width))

    def close(self) -> None:
        self._live.stop()
        super().close()


def open_console(mode: Mode, progress: Progress, logs: Path, terminal: TextIO, title: str) -> Console:
    """Open the console of this mode. `auto`: live on a terminal that can redraw, else plain."""
    transcript = logs / "console.log"
    if mode == "off":
        return Console(progress, transcript)
    can_redraw = terminal.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    if mode == "plain" or (mode == "auto" and not can_redraw):
        return PlainConsole(progress, transcript, terminal)
    return LiveConsole(progress, transcript, terminal, title)


class _Terminal(RichConsole):
    """Gets its size from its own file: descriptors 1 and 2, which rich would query, are redirected to a log."""

    @property  # type: ignore[misc]  # rich's has a setter, too
    def size(self) -> ConsoleDimensions:
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except OSError:
            return super().size
        return ConsoleDimensions(columns, lines) if columns > 0 and lines > 0 else super().size


class View:
    """The whole Progress at the moment of drawing, cut to the size of the terminal."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        framed = options.max_width >= FRAMED
        width = min(options.max_width, WIDEST)
        inner = options.update(width=width - 4 if framed else width, height=None)
        room = options.size.height - (3 if framed else 1)  # the frame, and a line for the cursor
        lines: list[list[Segment]] = []

        def left() -> int:
            return max(0, room - len(lines))

        with self._progress.lock:
            for renderable, most in self._parts(inner, left):
                lines.extend(console.render_lines(renderable, inner, pad=False)[: min(most, left())])
        body = SegmentLines(lines, new_lines=True)
        yield Panel(body, title=Text(self._title, style="bold"), border_style="blue", width=width) if framed else body

    def _parts(self, options: ConsoleOptions, room: Callable[[], int]) -> Iterator[tuple[RenderableType, int]]:
        """Yield each part and the most lines that it may take, the most important first; `room`: lines left."""
        progress, width, ascii_only = self._progress, options.max_width, options.ascii_only
        m = progress.metrics
        yield _head(progress, width), 2
        if progress.step == 0:
            yield _phases(progress, progress.phases[-max(room() - 2, 1) :], ascii_only), room()
        if progress.step or progress.heldout:
            yield _metrics_and_curve(progress, width, ascii_only), room()
        seconds = [f"{name} {m[f'time/{name}']:.2f}" for name in PHASES if f"time/{name}" in m]
        if seconds:
            yield Text("seconds: " + ", ".join(seconds), style="dim", no_wrap=True, overflow="ellipsis"), 1
        newest = min(3, room() // 2)
        for message, count in list(progress.warnings.items())[-newest:] if newest else ():
            times = f" (x{count})" if count > 1 else ""
            yield _clipped(f"warning: {printable(message)}{times}", 2, width, "yellow"), 2
        if progress.sample and room() >= 3:
            # The prompt takes one line; the responses share the rest.
            most = max(1, min(3, (room() - 1) // 2))
            yield _clipped(f"Q: {printable(progress.sample[0].prompt)}", 1, width, "dim"), 1
            for sample in progress.sample:
                text = f"{sample.rank} ({sample.reward_text}): {printable(sample.response)}"
                yield _clipped(text, most, width, {"best": "green", "worst": "red"}.get(sample.rank, "")), most


def _clipped(text: str, lines: int, width: int, style: str) -> Text:
    clipped = Text(text, style=style)
    clipped.truncate(max(1, lines * width - 8), overflow="ellipsis")
    return clipped


def _head(progress: Progress, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 1), expand=True)
    cells: list[RenderableType] = [Text(f"step {progress.step}/{progress.total_steps}", style="bold", no_wrap=True)]
    line.add_column(no_wrap=True)
    if width >= WITH_BAR - 4:
        line.add_column(ratio=1)
        cells.append(ProgressBar(total=progress.total_steps, completed=progress.step))
    line.add_column(no_wrap=True, justify="right")
    left = progress.seconds_left
    cells.append(Text(duration(progress.elapsed) + ("" if left is None else f", left about {duration(left)}")))
    line.add_row(*cells)
    now = [f"{name} {duration(progress.clock() - since)}" for name, since in progress.activities.items()]
    return Group(line, Text(", ".join(now) or progress.now_doing or "waiting", style="dim", no_wrap=True))


def _phases(progress: Progress, phases: Sequence[Phase], ascii_only: bool) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for phase in phases:
        if phase.ended is None:
            mark, seconds = Text(".." if ascii_only else "…", style="yellow"), progress.clock() - phase.began
        else:
            mark, seconds = Text("ok" if ascii_only else "✓", style="green"), phase.ended - phase.began
        table.add_row(mark, Text(phase.name), duration(seconds))
    return table


def _metrics_and_curve(progress: Progress, width: int, ascii_only: bool) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    m = progress.metrics
    metric = progress.headline
    if progress.heldout:
        now, since = progress.heldout[-1][1], progress.heldout[0][1]
        change = change_text(metric, now - since) if len(progress.heldout) > 1 else ""
        table.add_row(headline_text(metric), Text(value_text(metric, now), style="bold"), change)
    for name, value in progress.other_sets.items():
        table.add_row(headline_text(name), value_text(name, value))
    for label, name, form in shown(m):
        style = "" if math.isfinite(m[name]) else "bold red"
        history = sparkline(progress.rewards, 16, ascii_only) if name == "reward/mean" else ""
        table.add_row(label, Text(form.format(m[name]).strip(), style=style), history)
    if m.get("reward/failed"):
        table.add_row("failed rewards", Text(f"{m['reward/failed']:g}", style="bold red"))
    if "time/step" in m:
        table.add_row("seconds per step", f"{m['time/step']:.2f}")
    if "tokens/per_second" in m:
        table.add_row("tokens per second", f"{m['tokens/per_second']:,.0f}")
    room = width - METRIC_COLUMNS if width >= WITH_CURVE - 4 else 0
    plot = curve(progress.heldout, room, 8, ascii_only, is_share(metric))
    if not plot:
        return table
    grid = Table.grid(padding=(0, 4))
    grid.add_row(table, Text("\n".join([headline_text(metric), *plot])))
    return grid
