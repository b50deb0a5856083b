"""Compares runs: their configurations, their metrics, their answers to the same prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import yaml

from rlkit.experience import UserError
from rlkit.view.curves import BOUNDS, bound_names
from rlkit.view.runs import Run
from rlkit.view.schema import AboutRuns, ComparedMetric, ComparedPrompt, CompareResult, ConfigKey, ConfigResult
from rlkit.view.trends import Interval, mean_difference

PROMPTS = 50
"""Prompts per page."""
ROWS_OF_PROMPT = 32
"""Rows of a prompt per run."""
UP = re.compile(r"(^|[/_])(accuracy|success)$|accuracy/|^reward/(heldout|mean)|^evaluation/(pass|best)@|per_second")
DOWN = re.compile(r"failed|truncated_share|skipped|unjudged|^time/|malformed|mismatch/logprob")
"""Names of metrics whose larger, or smaller, values are better; for others this is unknown."""
_PAIRED = {"accuracy/heldout": "correct", "reward/heldout": "reward"}
"""Metrics that are the mean of a column over evaluated samples, except those of further held-out sets."""
Points = dict[str, dict[int, float]]
"""Metric -> step -> value of a run."""


def configuration(runs: Sequence[Run], asked: AboutRuns) -> ConfigResult:
    """Return every key of config.yaml, with the differing ones first."""
    del asked
    flat = [dict(_flat(run.config)) for run in runs]
    rows = []
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key) for one in flat]
        rows.append(ConfigKey(key=key, values=values, differs=len(set(values)) > 1))
    return ConfigResult(keys=sorted(rows, key=lambda row: not row.differs))


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for name, own in value.items() for pair in _flat(own, f"{key}.{name}" if key else str(name))]
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return [(key, text.removesuffix("...").strip())] if key else []


def compare(runs: Sequence[Run], asked: AboutRuns) -> CompareResult:
    """Compare runs. Differences are the last run's values minus the first's, with intervals if there are pairs."""
    if len(runs) < 2:
        raise UserError("runs=A,B: a comparison needs at least two runs")
    points = [run.remembered("points", partial(_points, run)) for run in runs]
    names = dict.fromkeys(name for own in points for name in own)
    bounds = {written for name in names for bound in BOUNDS for written in bound_names(name, bound)}
    metrics = [_metric(runs, name, points) for name in names if name not in bounds]
    prompts, following = _prompts(runs, asked.cursor)
    return CompareResult(metrics=metrics, prompts=prompts, next=following)


def _points(run: Run) -> Points:
    """Return each metric's values by step: from evaluations if it has any, else from training."""
    metrics = run.metrics
    evaluated = {name: dict(points) for name in metrics.names if (points := metrics.evaluation.points(name))}
    trained = {name: dict(points) for name in metrics.names if (points := metrics.training.points(name))}
    return evaluated | {name: points for name, points in trained.items() if name not in evaluated}


def _metric(runs: Sequence[Run], name: str, of_runs: Sequence[Points]) -> ComparedMetric:
    points = [own.get(name, {}) for own in of_runs]
    values = [own[max(own)] if own else None for own in points]
    best = max if UP.search(name) else min if DOWN.search(name) else None
    first, last = values[0], values[-1]
    pairs = _of_prompts(runs[0], runs[-1], _PAIRED[name]) if name in _PAIRED else np.zeros(0)
    of_prompts = len(pairs) > 0
    if not of_prompts:
        common = sorted(points[0].keys() & points[-1].keys())
        pairs = np.array([points[-1][step] - points[0][step] for step in common[len(common) // 2 :]])
    interval = mean_difference(pairs, of_steps=not of_prompts)
    plain = None if first is None or last is None else last - first
    verdict = "" if best is None else f", which is {'better' if best is max else 'worse'}"
    if name.startswith("reward/") and _judges(runs[0], name) != _judges(runs[-1], name):
        verdict = ", but their rewards differ"
    if interval:
        words = _words(interval, of_prompts, verdict, runs)
    else:
        words = _words_without_pairs(plain, [_ends(own, name) for own in (of_runs[0], of_runs[-1])], verdict, runs)
    return ComparedMetric(
        name=name,
        values=values,
        best=[best(own.values()) if best and own else None for own in points],
        difference=interval.value if interval else plain,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        paired=len(pairs),
        words=words,
    )


def _judges(run: Run, name: str) -> object:
    """Return the configuration of the reward or verifier that produces a metric's values."""
    return run.option("verifier" if name.startswith(("reward/heldout", "reward/train")) else "reward")


def _words(interval: Interval, of_prompts: bool, verdict: str, runs: Sequence[Run]) -> str:
    over = "common prompts" if of_prompts else "the later half of the common steps"
    if interval.low <= 0 <= interval.high:
        return f"no winner over {over}: the interval contains 0"
    caution = "" if of_prompts else "; true of these two runs, not of other seeds"
    return f"{_above(interval.value, runs)} over {over}{verdict}{caution}"


def _words_without_pairs(
    difference: float | None, ends: Sequence[tuple[float, float] | None], verdict: str, runs: Sequence[Run]
) -> str:
    """Describe a difference without pairs. `ends`: bounds of the two runs' own intervals at their last steps."""
    if difference is None:
        return "one of the runs has no value"
    first, last = ends
    if first is None or last is None:
        return "last − last, too few pairs: the difference cannot be judged"
    if first[0] <= last[1] and last[0] <= first[1]:
        return "last − last, no winner: the intervals of the last evaluations overlap"
    above = _above(difference, runs)
    return f"last − last, {above}{verdict}: the intervals of the last evaluations do not overlap"


def _ends(points: Points, name: str) -> tuple[float, float] | None:
    """Return the bounds of the interval recorded with the metric's last value."""
    last = max(points.get(name, {}), default=0)
    ends = [points[own][last] for end in BOUNDS for own in bound_names(name, end) if last in points.get(own, {})]
    return (ends[0], ends[1]) if len(ends) == 2 else None


def _above(difference: float, runs: Sequence[Run]) -> str:
    higher, other = (runs[-1], runs[0]) if difference > 0 else (runs[0], runs[-1])
    return f"{higher.id} is above {other.id}"


def _of_prompts(first: Run, last: Run, column: str) -> np.ndarray:
    """Return the differences of means per prompt, at the last evaluated step of each run."""
    query = (
        f"SELECT prompt_id, avg({column}) FROM rows WHERE kind = 'evaluation' AND \"set\" IS NULL AND "
        f"{column} IS NOT NULL AND decoding IS NOT 'greedy' AND "
        "step = (SELECT max(step) FROM rows WHERE kind = 'evaluation') GROUP BY prompt_id"
    )
    one, other = (dict(run.index.all(query)) for run in (first, last))
    return np.array([other[prompt] - one[prompt] for prompt in sorted(one.keys() & other.keys())])


def _prompts(runs: Sequence[Run], after: str) -> tuple[list[ComparedPrompt], str | None]:
    """Return a page of the prompts that all runs have, by id, and the cursor of the next page."""
    known = [set(run.index.all("SELECT DISTINCT prompt_id FROM rows WHERE prompt_id > ?", after)) for run in runs]
    common = sorted(set.intersection(*known))
    page = common[:PROMPTS]
    return [_prompt(runs, prompt) for prompt in page], page[-1] if len(common) > len(page) else None


def _prompt(runs: Sequence[Run], prompt: str) -> ComparedPrompt:
    """Return a prompt with the newest samples of each run."""
    query = "SELECT id, reward FROM rows WHERE prompt_id = ? ORDER BY step DESC, id LIMIT ?"
    rows = [run.index.all(query, prompt, ROWS_OF_PROMPT) for run in runs]
    (head,) = runs[0].index.all("SELECT prompt FROM heads WHERE id = ?", rows[0][0][0])
    return ComparedPrompt(
        prompt_id=prompt,
        prompt_head=head,
        ids=[[id_ for id_, _ in own] for own in rows],
        rewards=[[reward for _, reward in own] for own in rows],
    )
