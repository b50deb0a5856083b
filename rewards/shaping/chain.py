"""Running a chain of steps over the scores of many groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rewards.shaping.references import Float64
from rewards.shaping.running import RunningStatistics
from rewards.shaping.steps import OutcomeStep, ProcessStep, ReferenceStep, RunningStep, Step
from rlkit.experience import Group, GroupScores, Sample, Score
from rlkit.experience.types import SpanReward

References = Callable[[ReferenceStep, Sequence[Group]], Sequence[Float64 | str]]
"""(step, groups) -> for each group's prompt the reference rewards [N], or the reason why there are none."""
Scored = Sequence[GroupScores | None]
"""Scores of many groups; None where the reward was not asked."""


class Chain:
    """The steps of one `shaping` list, in order, with their running statistics.

    Statistics over samples are taken group by group, over valid samples only. A sample that a step cannot shape is
    invalid, with the reason.
    """

    def __init__(self, steps: Sequence[Step], place: str, references: References) -> None:
        """`place` (`part polar`) is named in reasons."""
        self.steps, self._place, self._references = tuple(steps), place, references
        self.statistics = {i: RunningStatistics() for i, step in enumerate(steps) if isinstance(step, RunningStep)}

    def __call__(self, groups: Sequence[Group], scored: Scored, learn: bool = False) -> list[GroupScores | None]:
        """The scores after all steps. With `learn`, running statistics first count the values that reach them."""
        result = list(scored)
        for index, step in enumerate(self.steps):
            if isinstance(step, ProcessStep):
                result = [_each(scores, group, step) for group, scores in zip(groups, result, strict=True)]
            else:
                result = self._outcomes(index, step, groups, result, learn)
        return result

    def _outcomes(
        self, index: int, step: Step, groups: Sequence[Group], scored: Scored, learn: bool
    ) -> list[GroupScores | None]:
        asked = [(group, scores) for group, scores in zip(groups, scored, strict=True) if scores is not None]
        found = [_values(scores) for _, scores in asked]
        shaped: Sequence[Float64 | str]
        if isinstance(step, RunningStep):
            if learn:
                self.statistics[index].add(np.concatenate([values for _, values in found]) if found else np.zeros(0))
            shaped = [step.normalise(values, self.statistics[index]) for _, values in found]
        elif isinstance(step, ReferenceStep):
            given = self._references(step, [group for group, _ in asked])
            shaped = [_compared(step, values, refs) for (_, values), refs in zip(found, given, strict=True)]
        elif isinstance(step, OutcomeStep):
            lengths = [
                np.array([len(group.samples[i]) for i in where])
                for (group, _), (where, _) in zip(asked, found, strict=True)
            ]
            shaped = [step.apply(v, n) if len(v) else v for (_, v), n in zip(found, lengths, strict=True)]
        else:
            raise TypeError(f"{type(step).__name__} is no step of a known level")
        made = iter(
            self._with_values(step, scores, where, values)
            for ((_, scores), (where, _)), values in zip(zip(asked, found, strict=True), shaped, strict=True)
        )
        return [None if scores is None else next(made) for scores in scored]

    def _with_values(self, step: Step, scores: GroupScores, where: Sequence[int], values: Float64 | str) -> GroupScores:
        samples = list(scores.samples)
        for place, i in enumerate(where):
            if isinstance(values, str):
                samples[i] = Score.invalid(f"no_reference_reward: {self._place}: {values}", samples[i].trace)
            elif not np.isfinite(values[place]):
                reason = f"not_finite: {self._place}: {step.name} made {values[place]} of {samples[i].value}"
                samples[i] = Score.invalid(reason, samples[i].trace)
            else:
                samples[i] = replace(samples[i], value=float(values[place]))
        return replace(scores, samples=tuple(samples))

    def state_dict(self) -> dict[str, Any]:
        """The running statistics by step."""
        return {str(index): statistics.state_dict() for index, statistics in self.statistics.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of state_dict. Raises ValueError if the steps are others than those that were saved."""
        if set(state) != {str(index) for index in self.statistics}:
            raise ValueError(
                f"{self._place}: the saved state has running statistics of steps {sorted(state)}, this shaping of "
                f"{sorted(map(str, self.statistics))}; use the same shaping"
            )
        for index, statistics in self.statistics.items():
            statistics.load_state_dict(state[str(index)])


def _values(scores: GroupScores) -> tuple[list[int], Float64]:
    """Places and outcome values of the valid samples that have one."""
    pairs = [(i, score.value) for i, score in enumerate(scores.samples) if score.valid and score.value is not None]
    return [i for i, _ in pairs], np.array([value for _, value in pairs], dtype=np.float64)


def _compared(step: ReferenceStep, values: Float64, references: Float64 | str) -> Float64 | str:
    if isinstance(references, str) or not len(values):
        return references if isinstance(references, str) else values
    try:
        return step.compare(values, references)
    except ValueError as error:
        return f"{step.name}: {error}"


def _each(scores: GroupScores | None, group: Group, step: ProcessStep) -> GroupScores | None:
    if scores is None:
        return None
    shaped = (_process(score, sample, step) for score, sample in zip(scores.samples, group.samples, strict=True))
    return replace(scores, samples=tuple(shaped))


def _process(score: Score, sample: Sample, step: ProcessStep) -> Score:
    """Span rewards are one series of steps, in order of their ends; the rewards of trained tokens are another."""
    if not score.valid:
        return score
    spans = sorted(score.span_rewards, key=lambda span: (span.end, span.start))
    values = step.apply(np.array([span.value for span in spans], dtype=np.float64))
    made = tuple(SpanReward(s.start, s.end, float(value)) for s, value in zip(spans, values, strict=True))
    tokens = score.token_rewards
    if tokens is not None:
        tokens = tokens.copy()
        tokens[sample.trained] = step.apply(tokens[sample.trained].astype(np.float64))
    return replace(score, span_rewards=made, token_rewards=tokens)
