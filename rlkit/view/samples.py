"""Samples from the index: a sorted and filtered list, histograms, a scatter plot, distributions over steps."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rlkit.experience import UserError
from rlkit.view import schema, tokens
from rlkit.view.filter import FilterError, Sql, compile_filter, field
from rlkit.view.index import COLUMNS
from rlkit.view.runs import Run

MOST_ROWS = 1000
MOST_COLUMNS = 200
"""Most columns of a distribution over steps; if there are more steps, they are merged."""
SHOWN = [name for name in schema.SampleSummary.model_fields if name in COLUMNS]
_COLUMNS = threading.Lock()
"""Held while reading columns: sqlite3 releases the GIL at each row, so threads in parallel take twice as long as one
after another."""
_TERM = re.compile(r'"([^"]*)"?|(\S+)')


class Restricted(schema.AboutRun):
    """Which samples."""

    step: schema.Whole | None = None
    from_step: schema.Whole | None = None
    to_step: schema.Whole | None = None
    """The last step, inclusive."""
    filter: str = ""
    """An expression of rlkit/view/filter.py."""
    within: str = ""
    """A second expression that must also hold: keeping the user's own expression separate lets errors point into it."""
    q: str = ""
    """Words and "phrases" that the prompt or the response must contain."""
    group: str = ""
    prompt_id: str = ""


class SamplesAsked(Restricted):
    sort: str = "id"
    """A numeric field: `reward`, `component:NAME`, `rescored:NAME`."""
    order: Literal["asc", "desc"] = "asc"
    """Unknown numbers come last in either order."""
    cursor: str = ""
    limit: int = Field(default=100, ge=1, le=MOST_ROWS)


def samples(run: Run, asked: SamplesAsked) -> schema.SamplesResult:
    """Return a page of the list. Raises FilterError for a wrong filter or column."""
    key, where = _number(run, asked.sort), _where(run, asked)
    (total,) = run.index.all(f"SELECT count(*) FROM rows WHERE {where.text}", *where.parameters)
    after = _after(asked.cursor, key, asked.order)
    page = run.index.all(
        f"SELECT id, {key} AS key FROM rows WHERE {where.text} AND {after.text} "
        f"ORDER BY key IS NULL, key {asked.order}, id LIMIT ?",
        *where.parameters, *after.parameters, asked.limit + 1,
    )  # fmt: skip
    chosen = page[: asked.limit]
    more = len(page) > asked.limit
    cursor = base64.urlsafe_b64encode(json.dumps(chosen[-1]).encode()).decode() if more else None
    return schema.SamplesResult(total=total, rows=summaries(run, [row for row, _ in chosen]), next=cursor)


def _after(cursor: str, key: str, order: str) -> Sql:
    """Return the condition for the rows after a page: keys beyond its last key, equal ones by id, then missing keys."""
    if not cursor:
        return Sql("1")
    try:
        row, value = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        row, value = int(row), None if value is None else float(value)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"cursor={cursor[:40]}: not a cursor that this list returned; leave it out") from None
    if value is None:
        return Sql(f"({key} IS NULL AND id > ?)", (row,))
    sign = "<" if order == "desc" else ">"
    return Sql(f"({key} IS NULL OR {key} {sign} ? OR ({key} = ? AND id > ?))", (value, value, row))


def summaries(run: Run, ids: Sequence[int]) -> list[schema.SampleSummary]:
    """Return summaries of these rows, in this order; rows that no longer exist are left out."""
    places = ", ".join("?" * len(ids))
    names = run.index.names()
    columns = ", ".join(f'rows."{name}"' for name in SHOWN)
    further = "".join(f", rows.{column}" for family in names.values() for column in family.values())
    heads = "ifnull(heads.prompt, ''), ifnull(heads.response, '')"
    rows = run.index.all(
        f"SELECT {columns}, {field('tokens', {}).text}, {heads}{further} "
        f"FROM rows LEFT JOIN heads USING (id) WHERE rows.id IN ({places})",
        *ids,
    )
    shown = [*SHOWN, "has_tokens", "prompt_head", "response_head"]
    found = {}
    for row in rows:
        known: dict[str, Any] = dict(zip(shown, row, strict=False))
        numbers = iter(row[len(shown) :])
        own = {family: {name: next(numbers) for name in names[family]} for family in names}
        components, rescored = ({k: v for k, v in own[f].items() if v is not None} for f in ("component", "rescored"))
        found[known["id"]] = schema.SampleSummary(**known, components=components, rescored=rescored)
    return [found[row] for row in ids if row in found]


def columns(run: Run, names: Sequence[str], asked: Restricted) -> list[np.ndarray]:
    """Return numbers [N] of the chosen samples in the order of the file, one array per name; unknown: NaN."""
    keys, where = [_number(run, name) for name in names], _where(run, asked)
    known = ", ".join(f"ifnull({key}, 9e999)" for key in keys)  # no recorded number is infinite
    query = f"SELECT {known} FROM rows WHERE {where.text} ORDER BY id"
    with _COLUMNS:
        rows = run.index.connection().execute(query, where.parameters)
        table = np.fromiter(chain.from_iterable(rows), np.float64).reshape(-1, len(keys)).T
    return list(np.where(np.isinf(table), np.nan, table))


class HistogramAsked(Restricted):
    key: str
    bins: int = Field(default=40, ge=1, le=500)


def histogram(run: Run, asked: HistogramAsked) -> schema.HistogramResult:
    """Return a histogram of the finite numbers of the chosen samples."""
    (values,) = columns(run, [asked.key], asked)
    known = values[np.isfinite(values)]
    edges = _edges(known, asked.bins)
    counts = np.histogram(known, edges)[0] if len(known) else edges
    missing = len(values) - len(known)
    return schema.HistogramResult(key=asked.key, edges=edges.tolist(), counts=counts.tolist(), missing=missing)


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Return the edges of bins; whole numbers in a small range get one bin each."""
    if not len(values):
        return np.zeros(0)
    low, high = float(values.min()), float(values.max())
    if high - low < bins and (values == np.round(values)).all():
        return np.arange(low, high + 2) - 0.5
    return np.linspace(low, high if high > low else low + 1.0, bins + 1)


class ScatterAsked(Restricted):
    x: str
    y: str
    limit: int = Field(default=2000, ge=1, le=20000)


def scatter(run: Run, asked: ScatterAsked) -> schema.ScatterResult:
    """Return at most `limit` points; if there are more, every n-th."""
    x, y, ids = columns(run, [asked.x, asked.y, "id"], asked)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    chosen = known[np.linspace(0, max(0, len(known) - 1), min(len(known), asked.limit)).astype(np.int64)]
    points = list(zip(x[chosen].tolist(), y[chosen].tolist(), ids[chosen].astype(int).tolist(), strict=True))
    return schema.ScatterResult(points=points, total=len(known))


class DistributionAsked(schema.AboutRun):
    key: str
    bins: int = Field(default=30, ge=1, le=200)


def distribution(run: Run, asked: DistributionAsked) -> schema.DistributionResult:
    """Return a histogram per step, all with the same edges, of training or evaluated samples. `entropy` is that of
    tokens, if recorded."""
    return run.remembered(f"distribution {asked.bins} {asked.key}", partial(_distribution, run, asked))


def _distribution(run: Run, asked: DistributionAsked) -> schema.DistributionResult:
    if asked.key == "entropy":
        steps, values = tokens.recorded(run.path, "entropy")
    else:
        trained = run.index.all("SELECT 1 FROM rows WHERE kind = 'training' LIMIT 1")
        chosen = Restricted(run=asked.run, filter='kind = "training"' if trained else "")
        steps, values = columns(run, ["step", asked.key], chosen)
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(values):
        return schema.DistributionResult(key=asked.key, edges=[], steps=[], counts=[])
    edges = _edges(values, asked.bins)
    distinct = np.unique(steps).astype(np.int64)
    merged = -(-len(distinct) // MOST_COLUMNS)
    columns_ = np.searchsorted(distinct, steps) // merged
    counts = np.histogram2d(columns_, values, [np.arange(-(-len(distinct) // merged) + 1), edges])[0].astype(np.int64)
    return schema.DistributionResult(
        key=asked.key, edges=edges.tolist(), steps=distinct[::merged].tolist(), counts=counts.tolist()
    )


def _number(run: Run, name: str) -> str:
    """Return the SQL of a numeric column. Raises FilterError."""
    sql = field(name, run.index.names())
    if sql.kind == "text":
        raise FilterError(0, f"{name} is text, not a number")
    return sql.text


def _where(run: Run, asked: Restricted) -> Sql:
    equal: dict[str, int | str | None] = {"step =": asked.step, "step >=": asked.from_step, "step <=": asked.to_step}
    equal |= {"group_id =": asked.group or None, "prompt_id =": asked.prompt_id or None}
    conditions = [Sql(f"rows.{name} ?", (value,)) for name, value in equal.items() if value is not None]
    conditions += [compile_filter(text, run.index.names()) for text in (asked.filter, asked.within) if text.strip()]
    if words := _search(asked.q):
        conditions.append(Sql("rows.id IN (SELECT rowid FROM texts WHERE texts MATCH ?)", (words,)))
    text = " AND ".join(one.text for one in conditions) or "1"
    return Sql(text, tuple(value for one in conditions for value in one.parameters))


def _search(text: str) -> str:
    """Translate words and "phrases", all of which must occur, to FTS5 syntax; a word may end in `*`."""
    terms = []
    for phrase, word in _TERM.findall(text):
        start = word.endswith("*")
        own = (phrase or word).rstrip("*" if start else "").replace('"', '""').replace("\0", " ")
        if any(letter.isalnum() for letter in own):
            terms.append(f'"{own}"' + ("*" if start else ""))
    if text.strip() and not terms:
        raise UserError(f"q={text[:40]}: full-text search needs words or numbers")
    return " ".join(terms)
