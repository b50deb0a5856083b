"""Samples by the index: a sorted and filtered list, histograms, a scatter plot, distributions over steps."""

from __future__ import annotations

import base64
import json
import re
import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlkit.experience import UserError
from rlkit.view.asked import DistributionAsked, HistogramAsked, Restricted, SamplesAsked, ScatterAsked
from rlkit.view.filter import FilterError, Sql, Value, compile_filter, field
from rlkit.view.runs import Run
from rlkit.view.schema import DistributionResult, HistogramResult, SamplesResult, SampleSummary, ScatterResult

MOST_COLUMNS = 200
"""Of a distribution over steps; more steps are merged."""
_SHOWN = (
    "id", "step", "group_id", "prompt_id", "sample", "rank", "reward", "advantage", "length", "correct", "verdict",
    "finish_reason", "staleness", "dropped", "valid", "reason", "set", "kind",
)  # fmt: skip
_TERM = re.compile(r'"([^"]*)"?|(\S+)')


class CursorError(UserError):
    """It is not one that this list gave."""


def samples(run: Run, asked: SamplesAsked) -> SamplesResult:
    """A page of the list. Raises FilterError for a wrong filter or column."""
    key = _number(run, asked.sort)
    where = _where(run, asked)
    total = (
        run.index.connection().execute(f"SELECT count(*) FROM rows WHERE {where.text}", where.parameters).fetchone()[0]
    )
    down = asked.order == "desc"
    page = _page(run, where, key, down, _after(asked.cursor, key, down), asked.limit + 1)
    chosen = page[: asked.limit]
    more = len(page) > asked.limit
    return SamplesResult(
        total=total,
        rows=summaries(run, [number for number, _ in chosen]),
        next=_cursor(chosen[-1][1], chosen[-1][0]) if more else None,
    )


def _page(run: Run, where: Sql, key: Sql, down: bool, after: Sql, limit: int) -> list[tuple[int, float | None]]:
    direction = "DESC" if down else "ASC"
    text = (
        f"SELECT id, {key.text} AS key FROM rows WHERE {where.text} AND {after.text} "
        f"ORDER BY key IS NULL, key {direction}, id LIMIT ?"
    )
    values = (*key.parameters, *where.parameters, *after.parameters, limit)
    return [(number, value) for number, value in run.index.connection().execute(text, values)]


def _after(cursor: str, key: Sql, down: bool) -> Sql:
    """What comes behind the last row of a page: keys beyond its key, equal ones by id, then those without a key."""
    if not cursor:
        return Sql("1")
    try:
        value, number = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        known = (None if value is None else float(value)), int(number)
    except (ValueError, TypeError, OverflowError):
        raise CursorError(f"cursor={cursor[:40]}: not one that this list gave; ask without it") from None
    value, number = known
    if value is None:
        return Sql(f"({key.text} IS NULL AND id > ?)", (*key.parameters, number))
    sign = "<" if down else ">"
    text = f"({key.text} IS NULL OR {key.text} {sign} ? OR ({key.text} = ? AND id > ?))"
    return Sql(text, (*key.parameters, *key.parameters, value, *key.parameters, value, number))


def _cursor(value: float | None, number: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([value, number]).encode()).decode()


def summaries(run: Run, numbers: Sequence[int]) -> list[SampleSummary]:
    """Of these rows, in this order; rows that are gone are left out."""
    connection = run.index.connection()
    places = ", ".join("?" * len(numbers))
    columns = ", ".join(f'rows."{name}"' for name in _SHOWN)
    tokens = field("tokens", {}).text
    rows = connection.execute(
        f"SELECT {columns}, {tokens}, heads.prompt, heads.response FROM rows LEFT JOIN heads USING (id) "
        f"WHERE rows.id IN ({places})",
        numbers,
    ).fetchall()
    extra = connection.execute(
        f"SELECT extra.id, names.name, value FROM names CROSS JOIN extra ON extra.name = key AND id IN ({places})",
        numbers,
    )
    values: dict[int, dict[str, dict[str, float | None]]] = {n: {"component": {}, "rescored": {}} for n in numbers}
    for number, name, value in extra:
        family, _, own = name.partition(":")
        values[number][family][own] = value
    found = {row[0]: _summary(row, values[row[0]]) for row in rows}
    return [found[number] for number in numbers if number in found]


def _summary(row: Sequence[Any], extra: dict[str, dict[str, float | None]]) -> SampleSummary:
    *columns, has_tokens, prompt, response = row
    return SampleSummary(
        **dict(zip(_SHOWN, columns, strict=True)),
        components=extra["component"],
        rescored=extra["rescored"],
        has_tokens=has_tokens,
        prompt_head=prompt or "",
        response_head=response or "",
    )


def columns(run: Run, names: Sequence[str], asked: Restricted, limit: int | None = None) -> list[np.ndarray]:
    """Numbers [N] of the chosen samples in the order of the file, one array per name; unknown: NaN."""
    keys = [_number(run, name) for name in names]
    where = _where(run, asked)
    text = f"SELECT {', '.join(key.text for key in keys)} FROM rows WHERE {where.text} ORDER BY id"
    parameters: list[Value] = [value for key in keys for value in key.parameters]
    parameters += where.parameters
    if limit is not None:
        text, parameters = f"{text} LIMIT ?", [*parameters, limit]
    return list(numbers(run.index.connection().execute(text, parameters), len(names)).T)


def components(run: Run, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> values [N] of the rows `ids`, which ascend; unknown: NaN. Faster than as `columns` where all are read."""
    found = {}
    for name in run.index.names()["component"]:
        where = "WHERE name = (SELECT key FROM names WHERE names.name = ?)"
        of_row = run.index.connection().execute(f"SELECT id, value FROM extra {where}", (f"component:{name}",))
        rows, values = numbers(of_row, 2).T
        place = np.clip(np.searchsorted(rows, ids), 0, max(0, len(rows) - 1))
        there = rows[place] == ids if len(rows) else np.zeros(len(ids), dtype=bool)
        found[name] = np.where(there, values[place] if len(rows) else np.nan, np.nan)
    return found


def numbers(cursor: sqlite3.Cursor, width: int) -> np.ndarray:
    """The rows of a query [N, width]; a part at a time, because Python's numbers take five times the room."""
    parts = [np.zeros((0, width))]
    while rows := cursor.fetchmany(65536):
        parts.append(np.array(rows, dtype=np.float64))
    return np.concatenate(parts)


def histogram(run: Run, asked: HistogramAsked) -> HistogramResult:
    """Of finite numbers; edges are those of all chosen samples."""
    (values,) = columns(run, [asked.key], asked)
    known = values[np.isfinite(values)]
    edges, counts = _bins(known, asked.bins)
    missing = len(values) - len(known)
    return HistogramResult(key=asked.key, edges=edges.tolist(), counts=counts.tolist(), missing=missing)


def _bins(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Of whole numbers in a small range, one bin each."""
    if not len(values):
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    low, high = float(values.min()), float(values.max())
    if high - low < bins and (values == np.round(values)).all():
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    return edges, np.histogram(values, edges)[0]


def scatter(run: Run, asked: ScatterAsked) -> ScatterResult:
    """At most `limit` points: of more, every n-th."""
    x, y, number = columns(run, [asked.x, asked.y, "id"], asked)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    chosen = (
        known[np.linspace(0, len(known) - 1, min(len(known), asked.limit)).astype(np.int64)] if len(known) else known
    )
    points = zip(x[chosen].tolist(), y[chosen].tolist(), number[chosen].astype(int).tolist(), strict=True)
    return ScatterResult(points=list(points), total=len(known))


def distribution(run: Run, asked: DistributionAsked) -> DistributionResult:
    """A histogram of each step, all with the same edges; of training samples. `entropy`: of tokens, where recorded."""
    if asked.key == "entropy":
        from rlkit.view.tokens import recorded

        steps, values = recorded(run.path, "entropy")
    else:
        trained = Restricted(run=asked.run, filter='kind = "training"')
        steps, values = columns(run, ["step", asked.key], trained)
    known = np.isfinite(values)
    steps, values = steps[known].astype(np.int64), values[known]
    edges, _ = _bins(values, asked.bins)
    if not len(values):
        return DistributionResult(key=asked.key, edges=[], steps=[], counts=[])
    distinct = np.unique(steps)
    merged = -(-len(distinct) // MOST_COLUMNS)
    column = np.searchsorted(distinct, steps) // merged
    bin_ = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts = np.zeros((-(-len(distinct) // merged), len(edges) - 1), dtype=np.int64)
    np.add.at(counts, (column, bin_), 1)
    return DistributionResult(
        key=asked.key, edges=edges.tolist(), steps=distinct[::merged].tolist(), counts=counts.tolist()
    )


def _number(run: Run, name: str) -> Sql:
    """A column of numbers. Raises FilterError."""
    sql = field(name, run.index.names())
    if sql.kind == "text":
        raise FilterError(0, f"{name} is a text, not a number")
    return sql


def _where(run: Run, asked: Restricted) -> Sql:
    conditions: list[Sql] = []
    for text, value in (
        ("rows.step = ?", asked.step),
        ("rows.step >= ?", asked.from_step),
        ("rows.step <= ?", asked.to_step),
        ("rows.group_id = ?", asked.group or None),
        ("rows.prompt_id = ?", asked.prompt_id or None),
    ):
        if value is not None:
            conditions.append(Sql(text, (value,)))
    if asked.filter.strip():
        conditions.append(compile_filter(asked.filter, run.index.names()))
    if words := _search(asked.q):
        conditions.append(Sql("rows.id IN (SELECT rowid FROM texts WHERE texts MATCH ?)", (words,)))
    text = " AND ".join(one.text for one in conditions) or "1"
    return Sql(text, tuple(value for one in conditions for value in one.parameters))


def _search(text: str) -> str:
    """Words and "phrases", all of which must be there, in the language of FTS5; a word may end in `*`."""
    terms = []
    for phrase, word in _TERM.findall(text):
        start = word.endswith("*")
        own = (phrase or word).rstrip("*" if start else "").replace('"', '""').replace("\0", " ")
        if any(letter.isalnum() for letter in own):
            terms.append(f'"{own}"' + ("*" if start else ""))
    if text.strip() and not terms:
        raise UserError(f"q={text[:40]}: full text search wants words or numbers")
    return " ".join(terms)
