"""What metrics mean, how to read them, what to do about it, and when the viewer's lights warn: metrics.yaml.

The tables of docs/metrics.md are made of the same rows (docs/making/metric_tables.py).
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
"""Stands for a part of a metric's name that the run decides."""
_BOUND = re.compile(r"(above|below) (?:([\d.e-]+)|(?:([\d.]+) x )?([a-z_]+\.[a-z_.]+))")


class Bound(NamedTuple):
    """`above 0.1`, `below trainer.NAME`, `above 0.9 x trainer.NAME`."""

    side: Literal["above", "below"]
    factor: float
    key: str
    """Of the run's configuration; empty: the bound is `factor` itself."""


def _bounds(text: Any) -> tuple[Bound, ...]:
    """Raises ValueError for what is no bound, nor several joined by `or`."""
    found = []
    for part in str(text).split(" or "):
        match = _BOUND.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no bound: `above 0.1`, `below section.key`, `above 0.9 x section.key`")
        side, number, factor, key = match.groups()
        found.append(Bound("above" if side == "above" else "below", float(number or factor or 1), key or ""))
    return tuple(found)


Bounds = Annotated[tuple[Bound, ...], BeforeValidator(_bounds)]
Measure = Literal[
    "", "share of the step", "share of the step's samples", "share of the first steps'", "share of its best",
    "steps in a row",
]  # fmt: skip
"""What of the metric a light judges; empty: its value."""


def _several(names: Any) -> Any:
    return [names] if isinstance(names, str) else names


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(Strict):
    """Of a light: it shows the middle one of the last `window` values, and says fine where no bound is crossed."""

    id: str
    title: str
    measure: Measure = ""
    floor: float = 1e-9
    """`share of the first steps'`: where those were below it, a share of it."""
    look: Bounds = ()
    act: Bounds = ()
    window: int = 5
    fine_from: int = 5
    """How many steps must have reported the metric before the light says fine; until then it is too early."""
    alarm_from: int = 1
    """Likewise before it warns."""
    missing: str = ""
    """Why a run may not report the metric; without it, such a run has no such light."""
    absent: str = ""
    """Why it is fine that the last steps do not report it."""
    synchronous: str = ""
    """Why it is fine with `trainer.max_staleness=0`."""
    curves: tuple[str, ...] = ()
    """What a curve of it shows; empty: the metric."""


class MetricRow(Strict):
    """Texts are Markdown, as in the page."""

    names: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(alias="metric")
    meaning: str
    reading: str = ""
    remedy: str = ""
    light: Rule | None = None
    """Judges the first of `names`."""


@cache
def sections() -> Mapping[str, tuple[MetricRow, ...]]:
    """The tables of docs/metrics.md, by the names that its comments give them."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    written = yaml.load(TABLE.read_text(encoding="utf-8"), Loader=loader)
    return TypeAdapter(dict[str, tuple[MetricRow, ...]]).validate_python(written)


@cache
def rows() -> tuple[MetricRow, ...]:
    return tuple(row for section in sections().values() for row in section)


def about(metric: str) -> MetricRow:
    """Its own row, or one that describes metrics like it. Raises KeyError where there is none."""
    for row in rows():
        if metric in row.names:
            return row
    for row in rows():
        if any(stands_for(name, metric) for name in row.names):
            return row
    raise KeyError(metric)


def named(word: str) -> list[MetricRow]:
    """That of a metric, or those in whose names the word is."""
    try:
        return [about(word)]
    except KeyError:
        return [row for row in rows() if any(word in name for name in row.names)]


def stands_for(name: str, metric: str) -> bool:
    """Whether a name of the table is that of the metric; the parts that vary are not empty."""
    return _pattern(name).fullmatch(metric) is not None


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(".+".join(map(re.escape, VARIES.split(name))))


def plain(markdown: str) -> str:
    """Without links and marks of code."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")
