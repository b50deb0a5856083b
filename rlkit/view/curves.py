"""Metrics over steps: curves, tiles of the overview, where the time goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rlkit.view.asked import AboutRun, MetricsAsked
from rlkit.view.health import lights
from rlkit.view.metrics import Table
from rlkit.view.rows import number
from rlkit.view.runs import Run
from rlkit.view.samples import summaries
from rlkit.view.schema import (
    HealthResult,
    MetricsResult,
    Numbers,
    OverviewResult,
    Progress,
    Series,
    Tile,
    TimeResult,
    Warned,
)

POINTS = 60
"""Of a tile's line."""
PHASES = ("generate", "score", "advantages", "update", "publish")
_WARNING = re.compile(r"^(?:\d\d:\d\d:\d\d )?warning: (.*?)(?: \((\d+) times by now\))?$")


def metrics(run: Run, asked: MetricsAsked) -> MetricsResult:
    """Columns of the named metrics; of evaluations also the bounds of their intervals, `NAME/low` and `NAME/high`."""
    known = run.metrics
    names = known.names if asked.names == "*" else [name for name in asked.names.split(",") if name]
    return MetricsResult(
        run=run.id,
        names=known.names,
        training=_series(known.training, names, asked.from_, _sampled(run)),
        evaluation=_series(known.evaluation, names, asked.from_, None),
    )


def _series(table: Table, names: Sequence[str], first: int, sampled: Numbers | None) -> Series:
    steps = table.steps
    start = next((i for i, step in enumerate(steps) if step >= first), len(steps))
    values = {name: table.column(name)[start:] for name in names}
    for name in names:
        for bound in ("low", "high"):
            column = table.column(f"{name}_{bound}")
            if any(value is not None for value in column):
                values[f"{name}/{bound}"] = column[start:]
    return Series(
        step=steps[start:],
        seconds=table.column("seconds")[start:],
        samples=(sampled or [None] * len(steps))[start:],
        values=values,
    )


def _sampled(run: Run) -> Numbers | None:
    """Responses sampled up to each step: those of the groups trained on and of those that filters rejected."""
    groups, size = number(run.option("trainer.prompts_per_step")), number(run.option("algorithm.samples_per_prompt"))
    if groups is None or size is None:
        return None
    table = run.metrics.training
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
    _Shown(("reward/mean",), "reward", "mean of all valid samples of the step, rejected groups included", "", "up"),
    _Shown(
        ("accuracy/train", "preference/accuracy"), "training accuracy",
        "right answers among the samples of the step, by the verifier", "share", "up",
    ),
    _Shown(("length/mean",), "length", "mean tokens of a response", "tokens"),
    _Shown(("length/truncated_share",), "cut off", "responses that reached the limit of tokens", "share", "down"),
    _Shown(("reward/failed",), "failed rewards", "samples of the step without a valid score", "", "down"),
    _Shown(
        ("group/all_equal_share",), "groups that teach nothing",
        "groups whose samples all got the same reward", "share", "down",
    ),
    _Shown(("policy/entropy",), "entropy", "of the next token, mean over the step", "nats"),
    _Shown(("time/step",), "seconds per step", "evaluations left out", "s", "down"),
)  # fmt: skip


def overview(run: Run, asked: AboutRun) -> OverviewResult:
    del asked
    last = run.index.connection().execute("SELECT id FROM rows ORDER BY id DESC LIMIT 3").fetchall()
    return OverviewResult(
        tiles=[tile for shown in TILES if (tile := _tile(run, shown)) is not None],
        lights=lights(run),
        progress=progress(run),
        last=summaries(run, [number_ for (number_,) in last]),
        warnings=_warnings(run),
    )


def health(run: Run, asked: AboutRun) -> HealthResult:
    del asked
    return HealthResult(lights=lights(run))


def _tile(run: Run, shown: _Shown) -> Tile | None:
    metrics_ = run.metrics
    for name in shown.names:
        points = metrics_.evaluation.points(name) or metrics_.training.points(name)
        if points:
            first, value = points[0][1], points[-1][1]
            return Tile(
                name=name, title=shown.title, value=value, first=first, change=value - first, unit=shown.unit,
                better=shown.better, series=thinned(points, POINTS), note=shown.note,
            )  # fmt: skip
    return None


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float | None]]:
    """Means over equal runs of neighbouring points, at the last step of each."""
    edges = [round(i * len(points) / min(most, len(points))) for i in range(min(most, len(points)) + 1)]
    parts = [points[start:end] for start, end in pairwise(edges)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def progress(run: Run) -> Progress:
    step, total, pace = run.metrics.step, run.total_steps, run.seconds_per_step()
    going = run.state()[0] == "running" and total is not None and pace is not None
    remaining = max(0, (total or 0) - step) * (pace or 0.0) if going else None
    return Progress(step=step, total=total, seconds_per_step=pace, remaining_seconds=remaining)


def _warnings(run: Run) -> list[Warned]:
    """Of logs/console.log: each text once, with how often it came as far as the log says."""
    try:
        lines = (run.path / "logs" / "console.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    counts: dict[str, int] = {}
    for line in lines:
        if match := _WARNING.match(line):
            text = match.group(1)
            counts[text] = max(int(match.group(2) or 0), counts.get(text, 0) + (match.group(2) is None))
    return [Warned(text=text, count=count) for text, count in counts.items()]


def where_time_goes(run: Run, asked: AboutRun) -> TimeResult:
    del asked
    table = run.metrics.training
    seconds = {phase: table.column(f"time/{phase}") for phase in PHASES}
    seconds = {phase: column for phase, column in seconds.items() if any(v is not None for v in column)}
    whole = table.column("time/step")
    spent = [sum(column[i] or 0.0 for column in seconds.values()) for i in range(len(whole))]
    overlap = [None if step is None else max(0.0, phases - step) for step, phases in zip(whole, spent, strict=True)]
    return TimeResult(
        phases=list(seconds),
        steps=table.steps,
        seconds=seconds,
        step_seconds=whole,
        overlap=overlap,
        tokens_per_second=table.column("tokens/per_second"),
        idle={who: table.column(f"time/{who}_idle") for who in ("learner", "engine")},
        frozen=table.column("time/frozen"),
    )
