"""Runs beside one another: their configurations, their metrics, their answers to the same prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from rlkit.experience import UserError
from rlkit.view.asked import AboutRuns
from rlkit.view.metrics import Table
from rlkit.view.runs import Run
from rlkit.view.schema import ComparedMetric, ComparedPrompt, CompareResult, ConfigKey, ConfigResult, Numbers
from rlkit.view.trends import Interval, mean_difference

PROMPTS = 50
"""A page of them."""
ROWS_OF_PROMPT = 32
"""Of each run."""


def configuration(runs: Sequence[Run]) -> ConfigResult:
    """Every key of config.yaml, the differing ones first."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = []
    for key in keys:
        values = [one.get(key) for one in flat]
        rows.append(ConfigKey(key=key, values=values, differs=len(set(values)) > 1))
    return ConfigResult(keys=sorted(rows, key=lambda row: not row.differs))


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for name, own in value.items() for pair in _flat(own, f"{key}.{name}" if key else str(name))]
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return [(key, text.removesuffix("\n...").removesuffix("...").strip())] if key else []


def compare(runs: Sequence[Run], asked: AboutRuns) -> CompareResult:
    """Differences are the last run's values minus the first's."""
    if len(runs) < 2:
        raise UserError("runs=A,B: a comparison wants at least two runs")
    names = dict.fromkeys(name for table in ("evaluation", "training") for run in runs for name in _names(run, table))
    prompts, following = _prompts(runs, asked.cursor)
    return CompareResult(metrics=[_metric(runs, name) for name in names], prompts=prompts, next=following)


def _names(run: Run, table: str) -> list[str]:
    metrics = run.metrics
    return [name for name in metrics.names if getattr(metrics, table).last(name) is not None]


def _table(run: Run, name: str) -> Table:
    metrics = run.metrics
    return metrics.evaluation if metrics.evaluation.last(name) is not None else metrics.training


def _metric(runs: Sequence[Run], name: str) -> ComparedMetric:
    points = [_table(run, name).points(name) for run in runs]
    values: Numbers = [own[-1][1] if own else None for own in points]
    up = better(name)
    best: Numbers = [None if up is None or not own else (max if up else min)(v for _, v in own) for own in points]
    first, last = values[0], values[-1]
    pairs = _paired(runs[0], runs[-1], name)
    over = "common prompts"
    if pairs is None:
        pairs, over = _over_steps(dict(points[0]), dict(points[-1])), "the later half of the common steps"
    interval = mean_difference(pairs) if over == "common prompts" else _mean_of_steps(pairs)
    return ComparedMetric(
        name=name,
        values=values,
        best=best,
        difference=interval.value if interval else None if first is None or last is None else last - first,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        paired=len(pairs),
        words=_words(interval, over, up, runs),
    )


def better(name: str) -> bool | None:
    """Whether larger values are better; None where that cannot be said of the name."""
    if re.search(
        r"(^|[/_])(accuracy|success)$|accuracy/|^reward/(heldout|mean)|^evaluation/(pass|best)@|per_second", name
    ):
        return True
    if re.search(r"failed|truncated_share|skipped|unjudged|^time/|malformed|mismatch/logprob", name):
        return False
    return None


def _words(interval: Interval | None, over: str, up: bool | None, runs: Sequence[Run]) -> str:
    if interval is None:
        return "no pairs: nothing can be said of the difference"
    if interval.low <= 0 <= interval.high:
        return f"no winner over {over}: the interval holds 0"
    higher = runs[-1].id if interval.value > 0 else runs[0].id
    other = runs[0].id if interval.value > 0 else runs[-1].id
    judged = "" if up is None else f", which is {'better' if up else 'worse'}"
    caution = "" if over == "common prompts" else "; of these two runs, not of other seeds"
    return f"{higher} is above {other} over {over}{judged}{caution}"


def _mean_of_steps(pairs: np.ndarray) -> Interval | None:
    """Neighbouring steps are alike: the variance grows as in `trends.slope`."""
    plain = mean_difference(pairs)
    if plain is None or len(pairs) < 4:
        return plain
    rest = pairs - pairs.mean()
    size = float(rest @ rest)
    lag = float(rest[1:] @ rest[:-1]) / size if size > 0 else 0.0
    half = (plain.high - plain.value) * (((1 + lag) / (1 - lag)) ** 0.5 if 0 < lag < 1 else 1.0)
    return Interval(plain.value, plain.value - half, plain.value + half)


def _over_steps(first: dict[int, float], last: dict[int, float]) -> np.ndarray:
    common = sorted(first.keys() & last.keys())
    return np.array([last[step] - first[step] for step in common[len(common) // 2 :]])


def _paired(first: Run, last: Run, name: str) -> np.ndarray | None:
    """Differences of means per prompt, where a metric is the mean over evaluated samples of both runs."""
    column = {"accuracy/heldout": "correct", "reward/heldout": "reward"}.get(name)
    if column is None:
        return None
    a, b = (_by_prompt(run, column) for run in (first, last))
    common = sorted(a.keys() & b.keys())
    return np.array([b[prompt] - a[prompt] for prompt in common]) if common else None


def _by_prompt(run: Run, column: str) -> dict[str, float]:
    """Of the last evaluated step."""
    rows = run.index.connection().execute(
        f"SELECT prompt_id, avg({column}) FROM rows WHERE kind = 'evaluation' AND {column} IS NOT NULL AND "
        "decoding IS NOT 'greedy' AND "
        "step = (SELECT max(step) FROM rows WHERE kind = 'evaluation') GROUP BY prompt_id"
    )
    return dict(rows.fetchall())


def _prompts(runs: Sequence[Run], after: str) -> tuple[list[ComparedPrompt], str | None]:
    """Those that all runs have, by id."""
    known = [
        {prompt for (prompt,) in run.index.connection().execute("SELECT DISTINCT prompt_id FROM rows")} for run in runs
    ]
    common = sorted(prompt for prompt in set.intersection(*known) if prompt > after)
    page = common[:PROMPTS]
    return [_prompt(runs, prompt) for prompt in page], page[-1] if len(common) > len(page) else None


def _prompt(runs: Sequence[Run], prompt: str) -> ComparedPrompt:
    """The newest samples of each run."""
    rows = [
        run.index.connection()
        .execute(
            "SELECT id, reward FROM rows WHERE prompt_id = ? ORDER BY step DESC, id LIMIT ?", (prompt, ROWS_OF_PROMPT)
        )
        .fetchall()
        for run in runs
    ]
    (head,) = runs[0].index.connection().execute("SELECT prompt FROM heads WHERE id = ?", (rows[0][0][0],)).fetchone()
    return ComparedPrompt(
        prompt_id=prompt,
        prompt_head=head,
        ids=[[number for number, _ in own] for own in rows],
        rewards=[[reward for _, reward in own] for own in rows],
    )
