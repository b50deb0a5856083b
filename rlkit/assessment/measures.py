"""Computes numbers from rows of answers, in pure functions; the formulas are in `rlkit.experience.statistics`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.assessment.rows import ASKS, Decoding, Row
from rlkit.config.parts import OWN
from rlkit.experience.statistics import (
    Difference,
    Estimate,
    Values,
    best_sizes,
    compare,
    expected_best,
    expected_choice,
    expected_majority,
    expected_worst,
    mean_of_questions,
)

Answers = Sequence[Row]


@dataclass(frozen=True)
class Line:
    """All answers of one model, sampled in one way."""

    step: int
    decoding: Decoding
    graded: bool
    """Whether answers are right or wrong; otherwise they have values of any size."""
    questions: Mapping[str, Answers]
    """Answers by the id of their question."""
    set: str = OWN
    """The set that the questions are from."""

    @property
    def rows(self) -> list[Row]:
        return [row for answers in self.questions.values() for row in answers]

    def value(self, row: Row) -> float:
        """Return the answer's value; NaN if it was not judged."""
        value = row.get("correct") if self.graded else row.get("verdict")
        if value is None and self.graded and row.get("unjudged") is None and "ended" in row:
            return 0.0  # an episode without a success mark, where others have one
        return math.nan if value is None else float(value)

    def judged(self) -> dict[str, tuple[Answers, Values]]:
        """Return question -> its judged answers and their values."""
        found: dict[str, tuple[Answers, Values]] = {}
        for question, answers in self.questions.items():
            kept = [(row, value) for row in answers if not math.isnan(value := self.value(row))]
            if kept:
                found[question] = [row for row, _ in kept], np.array([value for _, value in kept])
        return found

    def means(self) -> dict[str, float]:
        return {question: float(np.mean(np.sort(values))) for question, (_, values) in self.judged().items()}


@dataclass(frozen=True)
class Measured:
    line: Line
    mean: Estimate
    """avg@k: the mean of all k answers to a question, over questions."""
    of_k: Mapping[str, Mapping[int, Estimate]]
    """`pass@`, `pass^`, `maj@`, `best@` (largest value), `chosen@` (best of k by the reward) -> k -> estimate."""
    answers: int
    wrong: int
    """Number judged and not right (graded answers below 1)."""
    left_out: int
    """Number not judged, and so in none of the means."""
    length: Estimate | None
    """Length in tokens; None if they were not counted."""
    truncated: float
    reward: Estimate | None
    """Reward by the chooser."""

    @property
    def area(self) -> str:
        return "accuracy" if self.line.graded else "reward"

    @property
    def headline(self) -> str:
        own = self.line.set == OWN and self.line.decoding != "greedy"
        return f"{self.area}/heldout" if own else f"{self._prefix}{self.area}"

    @property
    def _prefix(self) -> str:
        steps = ("evaluation", self.line.set, "greedy" if self.line.decoding == "greedy" else "")
        return "".join(f"{step}/" for step in steps if step)

    def metrics(self) -> dict[str, float]:
        """Return the metrics as rows of metrics.jsonl name them."""
        prefix = self._prefix
        estimates = {self.headline: self.mean}
        estimates |= {f"{prefix}{name}{k}": one for name, by_k in self.of_k.items() for k, one in by_k.items()}
        if self.length is not None:
            estimates[f"{prefix}length_mean"] = self.length
        if self.reward is not None:
            estimates[f"{prefix}reward_mean"] = self.reward
        metrics = {
            f"{prefix}samples": float(self.answers),
            f"{prefix}unjudged": float(self.left_out),
            f"{prefix}truncated_share": self.truncated,
        }
        for name, one in estimates.items():
            metrics[name] = one.value
            if not math.isnan(one.low):
                metrics |= {f"{name}/low": one.low, f"{name}/high": one.high}
        return metrics


def lines_of(rows: Iterable[Row], name: str = OWN) -> list[Line]:
    """Return the lines of a set, by step, sampled answers first. All use one kind of verdict: right or wrong if all
    judged answers have it, or if any episode is marked as success or failure."""
    kept = [row for row in rows if row.get("kind") == "evaluation" and row.get("set", OWN) == name]
    judged = [row for row in kept if row.get("correct") is not None or row.get("verdict") is not None]
    graded = [row.get("correct") is not None for row in judged]
    right_or_wrong = all(graded) or any(said and "ended" in row for said, row in zip(graded, judged, strict=True))
    by_line: dict[tuple[int, str], dict[str, list[Row]]] = {}
    for row in kept:
        line = by_line.setdefault((int(row["step"]), str(row.get("decoding") or "sampled")), {})
        line.setdefault(str(row["prompt_id"]), []).append(row)
    order = {"sampled": 0, "greedy": 1, "recorded": 2}
    return [
        Line(step, decoding, right_or_wrong, dict(sorted(questions.items())), name)  # type: ignore[arg-type]
        for (step, decoding), questions in sorted(by_line.items(), key=lambda item: (item[0][0], order[item[0][1]]))
    ]


def measured(line: Line, chooses: bool) -> Measured:
    """Compute a line's numbers; `chooses`: whether a reward besides the judge chooses the best of k."""
    judged, rows = line.judged(), line.rows
    values = [value for _, own in judged.values() for value in own.tolist()]
    lengths = _by_question(line, "length")
    cut = [row.get("finish_reason") == "length" for row in rows]
    return Measured(
        line,
        mean=mean_of_questions(list(line.means().values()), share=line.graded),
        of_k=_of_k(line, judged, chooses),
        answers=len(rows),
        wrong=sum(value < 1 for value in values) if line.graded else 0,
        left_out=len(rows) - len(values),
        length=mean_of_questions(lengths) if lengths else None,
        truncated=float(np.mean(cut)) if cut else math.nan,
        reward=mean_of_questions(rewards) if chooses and (rewards := _by_question(line, "reward")) else None,
    )


def _by_question(line: Line, key: str) -> list[float]:
    own = ([float(row[key]) for row in answers if row.get(key) is not None] for answers in line.questions.values())
    return [float(np.mean(np.sort(values))) for values in own if values]


def _of_k(line: Line, judged: Mapping[str, tuple[Answers, Values]], chooses: bool) -> dict[str, dict[int, Estimate]]:
    most = max((len(values) for _, values in judged.values()), default=0)
    votes = any(row.get("vote") is not None for rows, _ in judged.values() for row in rows)
    ways: dict[str, Callable[[Answers, Values, int], float]] = {}
    if line.graded:
        ways["pass@"] = lambda rows, values, k: expected_best(values, k)
        ways["pass^"] = lambda rows, values, k: expected_worst(values, k)
    else:
        ways["best@"] = lambda rows, values, k: expected_best(values, k)
    if votes:
        ways["maj@"] = lambda rows, values, k: expected_majority(_ballots(rows, values, line.graded), values, k)
    if chooses:
        ways["chosen@"] = lambda rows, values, k: expected_choice(values, _rewards(rows), k)
    table: dict[str, dict[int, Estimate]] = {}
    for name, way in ways.items():
        for k in best_sizes(most):
            full = [(rows, values) for rows, values in judged.values() if len(values) >= k]
            if name == "chosen@":  # an answer without a reward cannot be chosen
                full = [(rows, values) for rows, values in full if all(r.get("reward") is not None for r in rows)]
            if full:
                estimates = [way(rows, values, k) for rows, values in full]
                table.setdefault(name, {})[k] = mean_of_questions(estimates, share=line.graded)
    return table


def _ballots(rows: Answers, values: Values, graded: bool) -> list[str | None]:
    """Return each answer's vote; right answers share one, however they are written."""
    return ["right" if graded and value == 1 else row.get("vote") for row, value in zip(rows, values, strict=True)]


def _rewards(rows: Answers) -> Values:
    return np.array([float(row["reward"]) for row in rows])


def differences(first: Line, others: Sequence[Line]) -> list[tuple[Line, Difference]]:
    """Compare lines on the questions that they share with the first."""
    before, found = first.means(), []
    for line in others:
        means, other = line.means(), changed(first, line)
        same = {question: mean for question, mean in means.items() if question in before and question not in other}
        if same:
            found.append((line, compare(before, same)))
    return found


def changed(first: Line, second: Line) -> set[str]:
    """Ids that stand for different questions in the two lines."""
    one, two = (
        {question: rows[0].get(ASKS) for question, (rows, _) in line.judged().items()} for line in (first, second)
    )
    return {question for question in one.keys() & two.keys() if one[question] != two[question]}
