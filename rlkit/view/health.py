"""Lights: rules over metrics, with thresholds of the run's own configuration where it has some.

What a light says about its metric is the row of docs/metrics.md (rlkit/config/metric_table.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlkit.config.metric_table import about, plain
from rlkit.view.metrics import Table
from rlkit.view.rows import number
from rlkit.view.runs import Run
from rlkit.view.schema import Light
from rlkit.view.trends import together

WINDOW = 5
"""Steps whose middle value a light shows: one outlier is no state."""
State = Literal["good", "look", "bad", "unknown"]
WORDS: dict[State, str] = {"good": "fine", "look": "have a look", "bad": "act", "unknown": "not measured"}
Option = Callable[[str], Any]


class Limits(NamedTuple):
    """Beyond `look` a light says so, beyond `bad` it says act; None: never. `words` says where they come from."""

    look: float | None
    bad: float | None
    words: str = ""


@dataclass(frozen=True)
class Rule:
    id: str
    title: str
    metric: str
    """Whose row explains the light."""
    values: Callable[[Table, Option], list[tuple[int, float]]]
    """(step, value), where it is known."""
    limits: Callable[[Option], Limits]
    above: bool = True
    """Large values are the bad ones."""
    metrics: tuple[str, ...] = ()
    """What a curve of it shows; empty: `metric`."""
    always: bool = False
    """Shown as unknown where it was not measured."""
    fine: Callable[[Option], str | None] = field(default=lambda option: None)
    """Why there is nothing to measure, if so: the light is good."""


def lights(run: Run) -> list[Light]:
    metrics = run.metrics
    return judge(metrics.training, metrics.evaluation, run.option)


def judge(training: Table, evaluation: Table, option: Option) -> list[Light]:
    """All lights that apply. `option`: the value at a dotted key of the configuration, or None."""
    found = [light for rule in RULES if (light := _light(rule, training, option)) is not None]
    fooled = _fooled(training, evaluation)
    return found if fooled is None else [fooled, *found]


def _light(rule: Rule, training: Table, option: Option) -> Light | None:
    points = rule.values(training, option)
    if not points:
        why = rule.fine(option)
        if why is None and not rule.always:
            return None
        return _made(rule, "unknown" if why is None else "good", why or "no step reports it", [])
    limits = rule.limits(option)
    recent = sorted(value for _, value in points[-WINDOW:])
    value = recent[len(recent) // 2]
    state = _state(value, limits, rule.above)
    steps = [step for step, one in points if state != "good" and _state(one, limits, rule.above) in ("look", "bad")]
    side = "above" if rule.above else "below"
    bounds = [
        f"{word} {side} {bound:.3g}"
        for word, bound in (("look", limits.look), ("act", limits.bad))
        if bound is not None
    ]
    text = (
        f"{value:.3g}" + (f"; {', '.join(bounds)}" if bounds else "") + (f" ({limits.words})" if limits.words else "")
    )
    return _made(rule, state, text, steps)


def _state(value: float, limits: Limits, above: bool) -> State:
    sign = 1 if above else -1
    for state, bound in (("bad", limits.bad), ("look", limits.look)):
        if bound is not None and sign * value > sign * bound:
            return "bad" if state == "bad" else "look"
    return "good"


def _made(rule: Rule, state: State, value_text: str, steps: list[int]) -> Light:
    row = about(rule.metric)
    return Light(
        id=rule.id, title=rule.title, state=state, word=WORDS[state], value_text=value_text,
        meaning=plain(row.meaning), reading=plain(row.reading), remedy=plain(row.remedy),
        metrics=list(rule.metrics or (rule.metric,)), steps=steps,
    )  # fmt: skip


def _fooled(training: Table, evaluation: Table) -> Light | None:
    """Whether the reward rises while what is verified falls, over the last third of the run."""
    verified = "accuracy/heldout" if evaluation.points("accuracy/heldout") else "accuracy/train"
    judged = (evaluation if verified == "accuracy/heldout" else training).points(verified)
    trend = together(training.points("reward/mean"), judged)
    if trend is None:
        return None
    rising, falling = trend.first.low > 0, trend.second.high < 0
    state: State = "bad" if rising and falling else "good"
    flat = rising and not falling and trend.second.low <= 0
    row = about("accuracy/heldout")
    return Light(
        id="fooled",
        title="reward and accuracy",
        state="look" if flat else state,
        word={"bad": "the reward may be fooled", "look": "have a look", "good": "fine"}["look" if flat else state],
        value_text=f"steps {trend.start} to {trend.end}: reward {trend.first}, {verified} {trend.second} per 100 steps",
        meaning="whether the reward rises while verified answers do not: slopes of a line, with intervals of 95 %",
        reading="both should rise; the triage lists the samples",
        remedy=plain(row.remedy),
        metrics=["reward/mean", verified],
        steps=[] if state == "good" and not flat else [trend.start, trend.end],
    )


def _of(name: str) -> Callable[[Table, Option], list[tuple[int, float]]]:
    return lambda table, option: table.points(name)


def _constant(look: float | None, bad: float | None = None) -> Callable[[Option], Limits]:
    return lambda option: Limits(look, bad)


def _share_of_step(name: str) -> Callable[[Table, Option], list[tuple[int, float]]]:
    def values(table: Table, option: Option) -> list[tuple[int, float]]:
        steps = dict(table.points("time/step"))
        return [(step, value / steps[step]) for step, value in table.points(name) if steps.get(step)]

    return values


def _while_waiting(option: Option) -> Limits:
    if not number(option("trainer.max_staleness")):
        return Limits(None, None, "share of the step; synchronous: each waits for the other")
    return Limits(0.3, None, "share of the step")


def _mismatch(option: Option) -> Limits:
    look, bad = number(option("trainer.mismatch_alarm")), number(option("trainer.max_mismatch"))
    return Limits(look or 0.05, bad, "trainer.mismatch_alarm, trainer.max_mismatch")


def _failed_share(table: Table, option: Option) -> list[tuple[int, float]]:
    groups, size = number(option("trainer.prompts_per_step")), number(option("algorithm.samples_per_prompt"))
    return [(step, value / (groups * size)) for step, value in table.points("reward/failed")] if groups and size else []


def _failing(option: Option) -> Limits:
    most = number(option("reward.max_failed_share"))
    return Limits(0.0, most if most is None else most / 2, "share of samples; reward.max_failed_share ends the run")


def _entropy(table: Table, option: Option) -> list[tuple[int, float]]:
    """As a share of the first steps'."""
    points = table.points("policy/entropy")
    first = sum(value for _, value in points[:WINDOW]) / max(1, len(points[:WINDOW]))
    return [(step, value / first) for step, value in points] if first > 0 else []


def _skipped(table: Table, option: Option) -> list[tuple[int, float]]:
    """How many steps in a row, up to each, skipped an update."""
    row, points = 0, []
    for step, value in table.points("policy/skipped_updates"):
        row = row + 1 if value > 0 else 0
        points.append((step, float(row)))
    return points


def _skipping(option: Option) -> Limits:
    most = number(option("trainer.max_skipped_updates")) or 3.0
    return Limits(0.0, most - 1, f"trainer.max_skipped_updates={most:g} ends the run")


def _clipping(option: Option) -> Limits:
    norm = number(option("learner.max_grad_norm"))
    return Limits(norm if norm and math.isfinite(norm) else None, None, "learner.max_grad_norm")


def _stale(option: Option) -> Limits:
    bound = number(option("trainer.max_staleness"))
    return Limits(None if bound is None else 0.9 * bound, None, f"trainer.max_staleness={bound:g}" if bound else "")


def _synchronous(option: Option) -> str | None:
    bound = number(option("trainer.max_staleness"))
    return "synchronous: all samples are of the newest weights" if bound == 0 else None


RULES = (
    Rule(
        "mismatch", "sampler and learner agree", "mismatch/logprob_mean", _of("mismatch/logprob_mean"), _mismatch,
        metrics=("mismatch/logprob_mean", "mismatch/logprob_max", "kl/rollout"), always=True,
    ),
    Rule(
        "staleness", "staleness", "staleness/mean", _of("staleness/mean"), _stale,
        metrics=("staleness/mean", "staleness/max"), always=True, fine=_synchronous,
    ),
    Rule("ess", "what stale samples are worth", "mismatch/ess", _of("mismatch/ess"), _constant(0.9, 0.5), above=False),
    Rule(
        "weights", "weights arrive", "weights/canary_change", _of("weights/canary_change"), _constant(0.8, 0.5),
        above=False,
    ),
    Rule(
        "learner_waits", "learner waits", "time/learner_idle", _share_of_step("time/learner_idle"), _while_waiting,
        metrics=("time/learner_idle", "time/step"), always=True,
    ),
    Rule(
        "engine_waits", "engines wait", "time/engine_idle", _share_of_step("time/engine_idle"), _while_waiting,
        metrics=("time/engine_idle", "time/step"), always=True,
    ),
    Rule(
        "entropy", "entropy, as a share of the first steps'", "policy/entropy", _entropy, _constant(0.1, 0.02),
        above=False, always=True,
    ),
    Rule("kl", "distance from the reference", "kl/reference", _of("kl/reference"), _constant(0.1, 1.0), always=True),
    Rule(
        "skipped", "skipped updates in a row", "policy/skipped_updates", _skipped,
        _skipping, always=True,
    ),
    Rule("gradient", "size of the gradient", "policy/grad_norm", _of("policy/grad_norm"), _clipping),
    Rule("failed", "failed rewards", "reward/failed", _failed_share, _failing),
    Rule(
        "equal", "groups that teach nothing", "group/all_equal_share", _of("group/all_equal_share"),
        _constant(0.8, 0.999),
    ),
    Rule(
        "truncated", "answers cut off", "length/truncated_share", _of("length/truncated_share"), _constant(0.1, 0.5),
    ),
    Rule(
        "critic", "the critic explains returns", "critic/explained_variance", _of("critic/explained_variance"),
        _constant(0.1, 0.0), above=False,
    ),
    Rule(
        "prm", "the process reward model orders pairs", "prm/pair_accuracy", _of("prm/pair_accuracy"),
        _constant(0.55, 0.5), above=False,
    ),
)  # fmt: skip
