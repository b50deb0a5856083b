"""Lights: the rules of rlkit/config/metrics.yaml applied to a run's metrics, with thresholds from its configuration.

Green means measured and fine. A metric that the last steps did not measure, or too few steps did, is described in
words; a bad state that was the last known one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from rlkit.config.metric_table import Bound, MetricRow, Rule, about, plain, rows
from rlkit.view.metrics import Table
from rlkit.view.rows import number
from rlkit.view.runs import Run
from rlkit.view.schema import Light
from rlkit.view.trends import LEAST_POINTS, Interval, Together, together

WINDOW = 5
"""A metric that none of the last `WINDOW` steps reported is no longer known for the run."""
State = Literal["good", "look", "bad", "unknown"]
WORDS: dict[State, str] = {"good": "fine", "look": "have a look", "bad": "act", "unknown": "not measured"}
TOO_EARLY = "too few steps"
STAYS = 0.05
"""An accuracy without a significant change whose fitted line rises by no more than this counts as unchanged."""
Direction = Literal["rises", "falls", "stays", ""]
"""Empty: too uncertain to say."""
Option = Callable[[str], Any]
Points = Sequence[tuple[int, float]]
"""(step, value) where the value is known."""


def lights(run: Run) -> list[Light]:
    """Return the run's lights; none for a folder without a trained policy (an evaluation, a reward's training)."""
    metrics = run.metrics
    if run.is_evaluation or (run.config and run.option("algorithm") is None):
        return []
    return judge(metrics.training, metrics.evaluation, run.option)


def judge(training: Table, evaluation: Table, option: Option) -> list[Light]:
    """Return all lights that apply. `option` gives the value at a dotted key of the configuration, or None."""
    judged = [_light(row, row.light, training, option) for row in rows() if row.light is not None]
    return [light for light in (_reward_and_accuracy(training, evaluation), *judged) if light is not None]


def _light(row: MetricRow, rule: Rule, training: Table, option: Option) -> Light | None:
    def made(state: State, text: str, word: str = "", steps: Sequence[int] = ()) -> Light:
        return Light(
            id=rule.id, title=rule.title, state=state, word=word or WORDS[state], value_text=text,
            meaning=plain(row.meaning), reading=plain(row.reading), remedy=plain(row.remedy),
            metrics=list(rule.curves or row.names[:1]), steps=list(steps),
        )  # fmt: skip

    done, last = len(training.lines), training.steps[-WINDOW:]
    reported = _reported(row.names[0], training)
    points = _measured(reported, rule, training, option)
    recent = [point for point in points if point[0] in last]
    if done and rule.synchronous and number(option("trainer.max_staleness")) == 0:
        return made("good", "; ".join([*(f"{value:.3g}" for _, value in recent[-1:]), rule.synchronous]))
    if not recent and rule.absent and done >= rule.fine_from:
        return made("good", rule.absent)
    if not points:
        if done < rule.fine_from and (reported or rule.missing or rule.absent):
            return made("unknown", _of(done, rule), TOO_EARLY)
        return made("unknown", rule.missing) if rule.missing else None
    value = _middle((recent or points)[-rule.window :])
    look, act = _limits(rule.look, option), _limits(rule.act, option)
    text = f"{value:.3g}" + (f" ({rule.measure})" if rule.measure else "")
    if not look and not act:
        keys = ", ".join(bound.key for bound in (*rule.look, *rule.act))
        return made("unknown", f"{text}; config.yaml has no number at {keys}", "no threshold")
    text += f"; {_spelled(look, act)}"
    state = _state(value, look, act)
    if len(reported) < (rule.fine_from if state == "good" else rule.alarm_from):
        return made("unknown", f"{text}; {_of(len(reported), rule)}", TOO_EARLY)
    if not recent:
        text += f"; not reported since step {points[-1][0]}"
        state = "unknown" if state == "good" else state
    crossed = [step for step, one in points if state in ("look", "bad") and _state(one, look, act) != "good"]
    return made(state, text, steps=crossed)


def _of(steps: int, rule: Rule) -> str:
    return f"{steps} of the {rule.fine_from} steps needed"


def _middle(points: Points) -> float:
    """Return the median, so that one outlier does not decide the state."""
    values = sorted(value for _, value in points)
    return values[len(values) // 2]


class _Limit(NamedTuple):
    side: str
    value: float
    key: str

    def crossed(self, value: float) -> bool:
        return value > self.value if self.side == "above" else value < self.value


def _limits(bounds: Sequence[Bound], option: Option) -> list[_Limit]:
    """Return the limits, without those that the configuration leaves open."""
    limits = ((bound, number(option(bound.key)) if bound.key else 1.0) for bound in bounds)
    return [_Limit(bound.side, bound.factor * base, bound.key) for bound, base in limits if base is not None]


def _state(value: float, look: Sequence[_Limit], act: Sequence[_Limit]) -> State:
    if any(limit.crossed(value) for limit in act):
        return "bad"
    return "look" if any(limit.crossed(value) for limit in look) else "good"


def _spelled(look: Sequence[_Limit], act: Sequence[_Limit]) -> str:
    words = [
        f"{word} {' or '.join(f'{limit.side} {limit.value:.3g}' for limit in limits)}"
        for word, limits in (("look", look), ("act", act))
        if limits
    ]
    keys = ", ".join(limit.key for limit in (*look, *act) if limit.key)
    return ", ".join(words) + (f" ({keys})" if keys else "")


# -- what a light judges of its metric ---------------------------------------------------------------------------------


def _reported(metric: str, training: Table) -> Points:
    """Return the metric's points; metrics of the policy's updates are unknown while only the critic learns."""
    waits = {step for step, value in training.points("policy/waits") if value and metric.startswith("policy/")}
    return [point for point in training.points(metric) if point[0] not in waits]


def _measured(points: Points, rule: Rule, training: Table, option: Option) -> Points:
    match rule.measure:
        case "share of the step":
            seconds = dict(training.points("time/step"))
            return [(step, value / seconds[step]) for step, value in points if seconds.get(step)]
        case "share of the step's samples":
            groups, size = number(option("trainer.prompts_per_step")), number(option("algorithm.samples_per_prompt"))
            return [(step, value / (groups * size)) for step, value in points] if groups and size else []
        case "share of the first steps'":
            first = [value for _, value in points[:WINDOW]]
            start = max(rule.floor, sum(first) / max(1, len(first)))
            return [(step, value / start) for step, value in points]
        case "share of its best":
            return _share_of_best(points)
        case "steps in a row":
            return _in_a_row(points)
        case "":
            return points


def _share_of_best(points: Points) -> Points:
    """Return shares of the best value so far, of means over `WINDOW` steps; 0 while all were 0."""
    values = [value for _, value in points]
    means = [sum(values[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(values) + 1)]
    bests = accumulate(means, max)
    shares = [mean / best if best > 0 else 0.0 for mean, best in zip(means, bests, strict=True)]
    return [(step, share) for (step, _), share in zip(points[WINDOW - 1 :], shares, strict=True)]


def _in_a_row(points: Points) -> Points:
    """Return, for each step, how many steps in a row up to it are above 0."""
    row, counts = 0, []
    for step, value in points:
        row = row + 1 if value > 0 else 0
        counts.append((step, float(row)))
    return counts


# -- two metrics at once -----------------------------------------------------------------------------------------------


class RewardAndAccuracy(NamedTuple):
    verified: str
    """The accuracy metric with enough values."""
    trend: Together | None
    """None: too few steps."""
    reward: Direction = ""
    accuracy: Direction = ""


def reward_and_accuracy(training: Table, evaluation: Table) -> RewardAndAccuracy:
    """Return the trends of both over the last third of the run, or over more of it if held-out evaluations are few."""
    heldout = evaluation.points("accuracy/heldout")
    known = len(heldout) >= LEAST_POINTS
    verified = "accuracy/heldout" if known else "accuracy/train"
    trend = together(training.points("reward/mean"), heldout if known else training.points(verified))
    if trend is None:
        return RewardAndAccuracy(verified, None)
    accuracy = _direction(trend.second) or (_between_evaluations(evaluation, trend) if known else "")
    if not accuracy and trend.second.value <= STAYS:
        accuracy = "stays"
    return RewardAndAccuracy(verified, trend, _direction(trend.first), accuracy)


def _direction(change: Interval) -> Direction:
    return "rises" if change.low > 0 else "falls" if change.high < 0 else ""


def _between_evaluations(evaluation: Table, trend: Together) -> Direction:
    """Compare the first and the last evaluation's own intervals: a curve that bends may rise without fitting a line."""
    low, high = (
        [value for step, value in evaluation.points(f"accuracy/heldout/{end}") if step >= trend.start]
        for end in ("low", "high")
    )
    if not low or not high:
        return ""
    return "rises" if low[-1] > high[0] else "falls" if high[-1] < low[0] else ""


def _reward_and_accuracy(training: Table, evaluation: Table) -> Light | None:
    """Return the light for a reward that rises while verified accuracy does not."""
    reward = training.points("reward/mean")
    if not reward:
        return None
    verified, trend, of_reward, of_accuracy = reward_and_accuracy(training, evaluation)

    def made(state: State, word: str, text: str, steps: Sequence[int] = ()) -> Light:
        return Light(
            id="fooled", title="reward and accuracy", state=state, word=word, value_text=text,
            meaning="whether the reward rises while verified accuracy does not; by fitted lines, with 95 % intervals",
            reading="both should rise; Triage lists the samples", remedy=plain(about("accuracy/heldout").remedy),
            metrics=["reward/mean", verified], steps=list(steps),
        )  # fmt: skip

    judged = evaluation.points(verified) if verified == "accuracy/heldout" else training.points(verified)
    if not judged and len(reward) >= LEAST_POINTS:
        return made("unknown", WORDS["unknown"], "no verifier: no accuracy/train, nor five values of accuracy/heldout")
    if trend is None:
        return made("unknown", TOO_EARLY, f"{min(len(reward), len(judged))} of the {LEAST_POINTS} steps needed")
    text = f"from step {trend.start} to {trend.end}: reward {trend.first}, {verified} {trend.second}"
    if of_accuracy == "rises":
        return made("good", WORDS["good"], text)
    ends = [trend.start, trend.end]
    if of_accuracy == "falls":
        bad = of_reward == "rises"
        return made("bad" if bad else "look", "the reward may be fooled" if bad else "accuracy falls", text, ends)
    if of_reward != "rises":
        return made("unknown", "neither rises", text)
    return made("look", WORDS["look"], text, ends) if of_accuracy else made("unknown", "too uncertain", text)
