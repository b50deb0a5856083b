"""`python -m rlkit.view --text RUN`: the overview of runs in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rlkit.tracking.progress import duration, printable, sparkline
from rlkit.view.curves import overview
from rlkit.view.runs import Run, Runs
from rlkit.view.schema import Light, SampleSummary, Tile
from rlkit.view.triage import triage

MARKS = {"good": ("+", "green"), "look": ("?", "yellow"), "bad": ("!", "bold red"), "unknown": (".", "dim")}
BARS = 24


def show(runs: Runs, console: Console | None = None) -> None:
    out = console or Console()
    for run in runs.all():
        run.index.follow()
        for part in rendered(run, ascii_only=out.options.ascii_only):
            out.print(part)


def rendered(run: Run, ascii_only: bool) -> Iterable[RenderableType]:
    """Yield the overview of a run: state, numbers and their changes, lights, suspicions, the last samples."""
    info, over = run.info(), overview(run)
    yield Rule(Text(f"{info.id}  ", style="bold"), align="left", characters="-" if ascii_only else "─")
    left = over.progress.remaining_seconds
    yield Text(info.state_text + ("" if left is None else f", about {duration(left)} left"))
    parts = " ".join(part for part in (info.algorithm, info.reward, info.model, info.data) if part)
    yield Text(printable(f"{parts}; {info.samples} samples of {info.kept_groups} groups"), style="dim")
    if over.tiles:
        yield _tiles(over.tiles, ascii_only)
    yield from (_light(light) for light in over.lights if light.state != "unknown")
    if silent := [light.title for light in over.lights if light.state == "unknown"]:
        yield Text(printable(f"no verdict (too early or not measured): {', '.join(silent)}"), style="dim")
    for finding in triage(run).findings:
        facts = "; ".join(f"{one.label}: {one.value}" for one in finding.evidence[:3])
        yield Text.assemble(("triage  ", "yellow"), (finding.title, "bold"), f"  {printable(facts)}")
    for warned in over.warnings[-3:]:
        times = f" ({warned.count} times)" if warned.count > 1 else ""
        yield Text(printable(f"warning: {warned.text}{times}"), style="yellow")
    yield from (_sample(row, ascii_only) for row in over.last)


def _tiles(tiles: Iterable[Tile], ascii_only: bool) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(no_wrap=True)
    for tile in tiles:
        line = sparkline([value for _, value in tile.series if value is not None], BARS, ascii_only)
        table.add_row(tile.title, _number(tile, tile.value), Text(_number(tile, tile.change, "+"), style="dim"), line)
    return table


def _number(tile: Tile, value: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    if tile.unit == "share":
        return f"{100 * value:{sign}.1f}" + (" points" if sign else " %")
    return f"{value:{sign}.4g} {tile.unit}".rstrip()


def _light(light: Light) -> Text:
    mark, style = MARKS[light.state]
    text = Text.assemble((f"{mark} ", style), (light.title, "bold"), f"  {light.word}: {light.value_text}")
    if light.state in ("look", "bad"):
        text.append(f"\n    {light.meaning}. {light.reading}. What to do: {light.remedy or '-'}", style="dim")
    return text


def _sample(row: SampleSummary, ascii_only: bool) -> RenderableType:
    reward = "no reward" if row.reward is None else f"reward {row.reward:.3f}"
    right = {1.0: ", right", 0.0: ", wrong"}.get(-1.0 if row.correct is None else row.correct, "")
    head = f"#{row.id} step {row.step}: {reward}{right}, {row.length} tokens, {row.finish_reason}"
    body = Group(Text(printable(row.prompt_head), style="dim"), Text(printable(row.response_head)))
    return Panel(body, title=printable(head), title_align="left", box=box.ASCII if ascii_only else box.ROUNDED)
