"""The live view: one screen that redraws itself, fitted to the size of the terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlkit.tracking.console import PHASES, SHOWN, Console, shown_reward, summary_lines
from rlkit.tracking.drawing import curve, duration, printable, sparkline
from rlkit.tracking.progress import Progress

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
