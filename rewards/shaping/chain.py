"""A chain of shaping steps, and the reference rewards that some steps need."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rewards.shaping.references import Float64
from rewards.shaping.steps import (
    PROCESS_LEVELS,
    FusingStep,
    OutcomeStep,
    ProcessStep,
    ReferenceStep,
    RunningStatistics,
    RunningStep,
    Step,
)
from rlkit.experience import Group, GroupScores, Prompt, Sample, Score
from rlkit.experience.steps import process_rewards
from rlkit.experience.types import SpanReward, text_group

CACHED_PROMPTS = 65536
"""The least recently used are dropped first."""

Scored = Sequence[GroupScores | None]
"""None where the reward was not asked."""
ScoreGroups = Callable[[Sequence[Group]], Scored]


class ReferenceRewards:
    """Reference rewards: a constant, a data column, or reference responses, scored once and cached by their texts."""

    def __init__(self, score: ScoreGroups) -> None:
        """`score` must be what scores the samples, before any shaping."""
        self._score = score
        self._cache: OrderedDict[str, Float64] = OrderedDict()

    def __call__(self, step: ReferenceStep, groups: Sequence[Group]) -> list[Float64 | str]:
        """Return per group [N] rewards, N >= 1, or the reason why there are none."""
        if step.reference_value is not None:
            return [np.array([step.reference_value], dtype=np.float64) for _ in groups]
        if step.reference_rewards is not None:
            return [_numbers(group.prompt, step.reference_rewards, step.max_references) for group in groups]
        assert step.reference_responses is not None
        return self._scored(step.reference_responses, step.max_references, groups)

    def _scored(self, column: str, most: int, groups: Sequence[Group]) -> list[Float64 | str]:
        texts = [_texts(group.prompt, column, most) for group in groups]
        # Not keyed by the prompt's id: a served reward sees several data sets, which may use the same ids.
        keys = [_digest(group.prompt, responses) for group, responses in zip(groups, texts, strict=True)]
        unscored = {
            key: text_group(f"reference/{group.prompt.id}", group.prompt, responses)
            for key, group, responses in zip(keys, groups, texts, strict=True)
            if key not in self._cache and not isinstance(responses, str)
        }
        failed = {key: reason for key, reason in zip(keys, texts, strict=True) if isinstance(reason, str)}
        if unscored:
            for key, scores in zip(unscored, self._score(list(unscored.values())), strict=True):
                rewards = _rewards(scores)
                if isinstance(rewards, str):
                    failed[key] = rewards
                else:
                    self._cache[key] = rewards
        result: list[Float64 | str] = []
        for key in keys:
            if key in failed:
                result.append(failed[key])
            else:
                self._cache.move_to_end(key)
                result.append(self._cache[key])
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return result


def _digest(prompt: Prompt, texts: Sequence[str] | str) -> str:
    messages = [(message.role, message.content) for message in prompt.messages]
    content = repr((messages, prompt.answer, prompt.references, texts))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _rewards(scores: GroupScores | None) -> Float64 | str:
    if scores is None:
        return "a reference response was not scored"
    values = []
    for score in scores.samples:
        if not score.valid:
            return f"a reference response got no score ({score.reason})"
        if score.value is None:
            return "a reference response got process rewards only"
        values.append(score.value)
    return np.array(values, dtype=np.float64)


def _texts(prompt: Prompt, column: str, most: int) -> Sequence[str] | str:
    cell: Any = prompt.references if column == "references" else prompt.columns.get(column)
    texts = [cell] if isinstance(cell, str) else cell
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return f"{column} of prompt {prompt.id} must be a text or a list of texts, not {cell!r:.80}"
    return list(texts[:most]) if texts else f"{column} of prompt {prompt.id} is empty"


def _numbers(prompt: Prompt, column: str, most: int) -> Float64 | str:
    cell = prompt.columns.get(column)
    numbers = list(cell) if isinstance(cell, list | tuple) else [cell]
    usable = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not numbers or not usable:
        return f"{column} of prompt {prompt.id} must be a number or a list of numbers, not {cell!r:.80}"
    return np.array(numbers[:most], dtype=np.float64)


References = Callable[[ReferenceStep, Sequence[Group]], Sequence[Float64 | str]]
Outcomes = tuple[list[int], Float64]
"""Indices and values [n] of a group's valid samples with a value."""


class Chain:
    """The steps of one `shaping` list, with running statistics over their valid samples.

    A sample that a step cannot shape becomes invalid, with the reason.
    """

    def __init__(self, steps: Sequence[Step], owner: str, references: References) -> None:
        self.steps, self._owner, self._references = tuple(steps), owner, references
        self.statistics = {i: RunningStatistics() for i, step in enumerate(steps) if isinstance(step, RunningStep)}

    def __call__(self, groups: Sequence[Group], scored: Scored, learn: bool = False) -> list[GroupScores | None]:
        """Shape all scores; with `learn`, each step first adds the values that reach it to its running statistics."""
        result = list(scored)
        for index, step in enumerate(self.steps):
            if isinstance(step, PROCESS_LEVELS):
                result = [
                    None if scores is None else _shape_process_rewards(scores, group, step)
                    for group, scores in zip(groups, result, strict=True)
                ]
            else:
                result = self._shape_outcomes(index, step, groups, result, learn)
        return result

    def _shape_outcomes(
        self, index: int, step: Step, groups: Sequence[Group], scored: Scored, learn: bool
    ) -> list[GroupScores | None]:
        pairs = [(group, scores) for group, scores in zip(groups, scored, strict=True) if scores is not None]
        outcomes = [_outcomes(scores) for _, scores in pairs]
        if learn and isinstance(step, RunningStep):
            self.statistics[index].add(np.concatenate([np.zeros(0), *(values for _, values in outcomes)]))
        shaped = self._apply(index, step, [group for group, _ in pairs], outcomes)
        results = iter(
            self._with_values(step, scores, indices, values)
            for (_, scores), (indices, _), values in zip(pairs, outcomes, shaped, strict=True)
        )
        return [None if scores is None else next(results) for scores in scored]

    def _apply(
        self, index: int, step: Step, groups: Sequence[Group], outcomes: Sequence[Outcomes]
    ) -> Sequence[Float64 | str]:
        """Return per group values [n], or the reason why there are none."""
        if isinstance(step, RunningStep):
            return [step.normalise(values, self.statistics[index]) for _, values in outcomes]
        if isinstance(step, ReferenceStep):
            references = self._references(step, groups)
            return [_compared(step, values, refs) for (_, values), refs in zip(outcomes, references, strict=True)]
        assert isinstance(step, OutcomeStep)
        return [
            step.apply(values, np.array([group.samples[i].length for i in indices])) if indices else values
            for group, (indices, values) in zip(groups, outcomes, strict=True)
        ]

    def _with_values(
        self, step: Step, scores: GroupScores, indices: Sequence[int], values: Float64 | str
    ) -> GroupScores:
        samples = list(scores.samples)
        if not isinstance(values, str) and np.shape(values) != (len(indices),):
            raise ValueError(f"{step.kind} made values of shape {np.shape(values)} from {len(indices)} values")
        for n, i in enumerate(indices):
            if isinstance(values, str):
                samples[i] = Score.invalid(f"no_reference_reward: {self._owner}: {values}", samples[i].trace)
            elif not np.isfinite(values[n]):
                reason = f"not_finite: {self._owner}: {step.kind} made {values[n]} from {samples[i].value}"
                samples[i] = Score.invalid(reason, samples[i].trace)
            else:
                samples[i] = replace(samples[i], value=float(values[n]))
        return replace(scores, samples=tuple(samples))

    def state_dict(self) -> dict[str, Any]:
        return {str(index): statistics.state_dict() for index, statistics in self.statistics.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the running statistics; raise ValueError if the saved steps differ."""
        if set(state) != {str(index) for index in self.statistics}:
            raise ValueError(
                f"{self._owner}: the saved state has running statistics of steps {sorted(state)}, this shaping of "
                f"{sorted(map(str, self.statistics))}; use the same shaping"
            )
        for index, statistics in self.statistics.items():
            statistics.load_state_dict(state[str(index)])


def _outcomes(scores: GroupScores) -> Outcomes:
    pairs = [(i, score.value) for i, score in enumerate(scores.samples) if score.valid and score.value is not None]
    return [i for i, _ in pairs], np.array([value for _, value in pairs], dtype=np.float64)


def _compared(step: ReferenceStep, values: Float64, references: Float64 | str) -> Float64 | str:
    if isinstance(references, str) or not len(values):
        return references if isinstance(references, str) else values
    try:
        return step.compare(values, references)
    except ValueError as error:
        return f"{step.kind}: {error}"


def _shape_process_rewards(scores: GroupScores, group: Group, step: ProcessStep | FusingStep) -> GroupScores:
    pairs = zip(scores.samples, group.samples, strict=True)
    return replace(scores, samples=tuple(_with_process_rewards(score, sample, step) for score, sample in pairs))


def _with_process_rewards(score: Score, sample: Sample, step: ProcessStep | FusingStep) -> Score:
    """Apply the step to span rewards, in order of their ends, and separately to the rewards of trained tokens.

    If the response was split into steps, its token rewards are first turned into step rewards, as algorithms see them.
    """
    if not score.valid:
        return score
    if sample.spans and score.token_rewards is not None and sample.trained.any():
        rewards, bounds = process_rewards(sample, score)
        whole = tuple(SpanReward(a, b, value) for (a, b), value in zip(bounds.tolist(), rewards.tolist(), strict=True))
        score = replace(score, span_rewards=whole, token_rewards=None)
    outcome = score.value
    if isinstance(step, FusingStep) and outcome is None:
        return Score.invalid(f"no_value: {step.kind} needs an outcome as well as the process rewards", score.trace)

    def shaped(values: Float64) -> Float64:
        return step.apply(values) if isinstance(step, ProcessStep) else step.apply(values, outcome or 0.0)

    spans = sorted(score.span_rewards, key=lambda span: (span.end, span.start))
    values = shaped(np.array([span.value for span in spans], dtype=np.float64))
    span_rewards = tuple(SpanReward(s.start, s.end, float(value)) for s, value in zip(spans, values, strict=True))
    tokens = score.token_rewards
    if tokens is not None:
        tokens = tokens.copy()
        tokens[sample.trained] = shaped(tokens[sample.trained].astype(np.float64))
    return replace(score, span_rewards=span_rewards, token_rewards=tokens)
