"""What metrics mean, how to read them, what to do about them, and when the viewer's lights warn: metrics.yaml.

The tables of docs/metrics.md are generated from the same rows (docs/making/metric_tables.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

TABLE = Path(__file__).with_name("metrics.yaml")
VARIES = re.compile(r"<\w+>|\.\.\.|NAME")
"""Placeholders for a part of a metric's name that depends on the run."""
_BOUND = re.compile(r"(above|below) (?:([\d.e-]+)|(?:([\d.]+) x )?([a-z_]+\.[a-z_.]+))")


class Bound(NamedTuple):
    """`above 0.1`, `below trainer.NAME`, `above 0.9 x trainer.NAME`."""

    side: Literal["above", "below"]
    factor: float
    key: str
    """A key of the run's configuration; empty: the bound is `factor` itself."""


def _bounds(text: Any) -> tuple[Bound, ...]:
    """Parse one or more bounds joined by `or`. Raise ValueError for anything else."""
    found = []
    for part in str(text).split(" or "):
        match = _BOUND.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a bound: `above 0.1`, `below section.key`, `above 0.9 x section.key`")
        side, number, factor, key = match.groups()
        found.append(Bound("above" if side == "above" else "below", float(number or factor or 1), key or ""))
    return tuple(found)


Bounds = Annotated[tuple[Bound, ...], BeforeValidator(_bounds)]
Measure = Literal[
    "", "share of the step", "share of the step's samples", "share of the first steps'", "share of its best",
    "steps in a row",
]  # fmt: skip
"""The quantity that a light judges; empty: the metric's value."""


def _several(names: Any) -> Any:
    return [names] if isinstance(names, str) else names


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(Strict):
    """The rule of a light. It shows the median of the last `window` values, and says fine if no bound is crossed."""

    id: str
    title: str
    measure: Measure = ""
    floor: float = 1e-9
    """For `share of the first steps'`: the smallest value to divide by."""
    look: Bounds = ()
    act: Bounds = ()
    window: int = 5
    fine_from: int = 5
    """How many steps must have reported the metric before the light says fine; until then it says too early."""
    alarm_from: int = 1
    """How many steps must have reported the metric before the light warns."""
    missing: str = ""
    """Why a run may not report the metric. If empty, such a run does not have this light."""
    absent: str = ""
    """Why it is fine if the last steps do not report the metric."""
    synchronous: str = ""
    """Why the light is fine with `trainer.max_staleness=0`."""
    curves: tuple[str, ...] = ()
    """Metrics that the light's curve shows; empty: its own metric."""


class MetricRow(Strict):
    """A row of the tables. Texts are Markdown, as on the page."""

    names: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(alias="metric")
    meaning: str
    reading: str = ""
    remedy: str = ""
    light: Rule | None = None
    """Judges the first of `names`."""


@cache
def sections() -> Mapping[str, tuple[MetricRow, ...]]:
    """Return the tables of docs/metrics.md, by the names in that page's comments."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    written = yaml.load(TABLE.read_text(encoding="utf-8"), Loader=loader)
    return TypeAdapter(dict[str, tuple[MetricRow, ...]]).validate_python(written)


@cache
def rows() -> tuple[MetricRow, ...]:
    return tuple(row for section in sections().values() for row in section)


def about(metric: str) -> MetricRow:
    """Return the metric's own row, or one whose pattern matches it. Raises KeyError if there is none."""
    for row in rows():
        if metric in row.names:
            return row
    for row in rows():
        if any(stands_for(name, metric) for name in row.names):
            return row
    raise KeyError(metric)


def named(word: str) -> list[MetricRow]:
    """Return the row of a metric, or the rows whose names contain the word."""
    try:
        return [about(word)]
    except KeyError:
        return [row for row in rows() if any(word in name for name in row.names)]


def stands_for(name: str, metric: str) -> bool:
    """Whether a name in the table matches the metric; parts that vary must not be empty."""
    return _pattern(name).fullmatch(metric) is not None


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(".+".join(map(re.escape, VARIES.split(name))))


def plain(markdown: str) -> str:
    """Return the text without links and code marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")
