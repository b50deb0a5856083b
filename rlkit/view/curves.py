"""Metrics over steps: curves, the overview's tiles, where the time goes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pydantic import Field

from rlkit.view import schema
from rlkit.view.health import lights
from rlkit.view.metrics import Table
from rlkit.view.rows import number
from rlkit.view.runs import Run
from rlkit.view.samples import summaries

POINTS = 60
"""Most points of a tile's line."""
PHASES = ("generate", "score", "advantages", "update", "publish")
_WARNING = re.compile(r"^(?:\d\d:\d\d:\d\d )?warning: (.*?)(?: \((\d+) times by now\))?$")


BOUNDS = ("low", "high")


class MetricsAsked(schema.AboutRun):
    names: str = ""
    """Names of metrics, separated by commas; `*`: all; empty: only list the names of all metrics."""
    from_: schema.Whole = Field(default=0, alias="from")
    """The first step."""


def metrics(run: Run, asked: MetricsAsked) -> schema.MetricsResult:
    """Return columns of the named metrics, for evaluations with the bounds of intervals, `NAME/low` and `NAME/high`."""
    known = run.metrics
    names = known.names if asked.names == "*" else [name for name in asked.names.split(",") if name]
    evaluation = known.evaluation
    return schema.MetricsResult(
        run=run.id,
        names=known.names,
        training=_series(known.training, names, asked.from_, _sampled(run)),
        evaluation=_series(evaluation, names, asked.from_, [None] * len(evaluation.steps)),
    )


def bound_names(name: str, bound: str) -> tuple[str, str]:
    """Return the names that a bound of the metric's interval may have: for a mean, or for an environment's metric."""
    return f"{name}/{bound}", f"{name}_{bound}"


def _series(table: Table, names: Sequence[str], first: int, samples: schema.Numbers) -> schema.Series:
    start = bisect_left(table.steps, first)
    values = {name: table.column(name)[start:] for name in names}
    for name in names:
        for bound in BOUNDS:
            for written in bound_names(name, bound):
                column = table.column(written)[start:]
                if any(value is not None for value in column):
                    values[f"{name}/{bound}"] = column
    return schema.Series(
        step=table.steps[start:], seconds=table.column("seconds")[start:], samples=samples[start:], values=values
    )


def _sampled(run: Run) -> schema.Numbers:
    """Return the responses sampled up to each step: in trained groups and in those that filters rejected."""
    groups, size = number(run.option("trainer.prompts_per_step")), number(run.option("algorithm.samples_per_prompt"))
    table = run.metrics.training
    if groups is None or size is None:
        return [None] * len(table.steps)
    rejected = table.column("buffer/rejected")
    return [size * (groups * step + (more or 0.0)) for step, more in zip(table.steps, rejected, strict=True)]


@dataclass(frozen=True)
class _Shown:
    """A tile for the first of `names` that the run has."""

    names: tuple[str, ...]
    title: str
    note: str
    unit: Literal["", "share", "tokens", "s", "nats"] = ""
    better: Literal["up", "down"] | None = None


TILES = (
    _Shown(
        ("accuracy/heldout", "preference/heldout_accuracy"), "held-out accuracy",
        "right answers to problems that are not trained on: the curve that counts", "share", "up",
    ),
    _Shown(("reward/heldout",), "held-out reward", "mean value of the held-out answers", "", "up"),
    _Shown(("reward/mean",), "reward", "mean of all valid samples of the step, including rejected groups", "", "up"),
    _Shown(
        ("accuracy/train", "preference/accuracy"), "training accuracy",
        "right answers among the step's samples, according to the verifier", "share", "up",
    ),
    _Shown(("length/mean",), "length", "mean tokens of a response", "tokens"),
    _Shown(("length/truncated_share",), "cut off", "responses that reached the token limit", "share", "down"),
    _Shown(("reward/failed",), "failed rewards", "samples of the step without a valid score", "", "down"),
    _Shown(
        ("group/all_equal_share",), "groups that teach nothing",
        "groups whose samples all got the same reward", "share", "down",
    ),
    _Shown(("policy/entropy",), "entropy", "of the next token, mean over the step", "nats"),
    _Shown(("time/step",), "seconds per step", "without evaluations", "s", "down"),
)  # fmt: skip


def overview(run: Run) -> schema.OverviewResult:
    last = run.index.all("SELECT id FROM rows ORDER BY id DESC LIMIT 3")
    tiles = [tile for shown in TILES if (tile := _tile(run, shown)) is not None]
    step, total, pace = run.metrics.step, run.total_steps, run.seconds_per_step()
    going = run.state()[0] == "running" and total is not None and pace is not None
    remaining = max(0, (total or 0) - step) * (pace or 0.0) if going else None
    progress = schema.Progress(step=step, total=total, seconds_per_step=pace, remaining_seconds=remaining)
    return schema.OverviewResult(
        tiles=tiles, lights=lights(run), progress=progress, last=summaries(run, last), warnings=_warnings(run)
    )


def _tile(run: Run, shown: _Shown) -> schema.Tile | None:
    metrics_ = run.metrics
    for name in shown.names:
        points = metrics_.evaluation.points(name) or metrics_.training.points(name)
        if points:
            first, value = points[0][1], points[-1][1]
            return schema.Tile(
                name=name, title=shown.title, value=value, first=first, change=value - first, unit=shown.unit,
                better=shown.better, series=thinned(points, POINTS), note=shown.note,
            )  # fmt: skip
    return None


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float | None]]:
    """Return means over equally long stretches of points, each at the stretch's last step."""
    count = min(most, len(points))
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    parts = [points[start:end] for start, end in pairwise(edges)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _warnings(run: Run) -> list[schema.Warned]:
    """Return the warnings in logs/console.log: each text once, with how often it occurred according to the log."""
    try:
        lines = (run.path / "logs" / "console.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    counts: dict[str, int] = {}
    for text, times in (match.groups() for line in lines if (match := _WARNING.match(line))):
        counts[text] = max(int(times or 0), counts.get(text, 0) + (times is None))
    return [schema.Warned(text=text, count=count) for text, count in counts.items()]


def where_time_goes(run: Run) -> schema.TimeResult:
    table = run.metrics.training
    columns = {phase: table.column(f"time/{phase}") for phase in PHASES}
    seconds = {phase: column for phase, column in columns.items() if any(v is not None for v in column)}
    steps = table.column("time/step")
    spent = [sum(column[i] or 0.0 for column in seconds.values()) for i in range(len(steps))]
    return schema.TimeResult(
        phases=list(seconds),
        steps=table.steps,
        seconds=seconds,
        step_seconds=steps,
        overlap=[None if own is None else max(0.0, all_ - own) for own, all_ in zip(steps, spent, strict=True)],
        tokens_per_second=table.column("tokens/per_second"),
        idle={who: table.column(f"time/{who}_idle") for who in ("learner", "engine")},
        frozen=table.column("time/frozen"),
    )
