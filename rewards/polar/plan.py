"""What has to be computed for one group, and how the results become its scores. No torch, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rewards.polar.serialise import SerialisationError, Serialiser, UnclosedThinking, prompt_text, without_thinking
from rlkit.experience import Group, GroupScores, Score

Reduce = Literal["mean", "max"]


@dataclass(frozen=True)
class Comparison:
    """The group's responses beside one reference: token sequences with a common prefix, each different one once."""

    prefix: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]
    sequence_of: tuple[int | str, ...]
    """Per sample: which suffix is its own, or why it has none."""


@dataclass(frozen=True)
class GroupPlan:
    """One comparison per reference; none if the prompt has no reference."""

    group: Group
    comparisons: tuple[Comparison, ...]

    def scores(self, values: Sequence[Sequence[float | str]], reduce: Reduce) -> GroupScores:
        """Scores from one raw logit (or the reason why there is none) per comparison and suffix."""
        return GroupScores(tuple(self._score(place, values, reduce) for place in range(len(self.group.samples))))

    def _score(self, place: int, values: Sequence[Sequence[float | str]], reduce: Reduce) -> Score:
        if not self.comparisons:
            return Score.invalid("no_reference: the prompt has no reference answer")
        raw: list[float] = []
        for comparison, logits in zip(self.comparisons, values, strict=True):
            which = comparison.sequence_of[place]
            if isinstance(which, str):
                return Score.invalid(which)
            logit = logits[which]
            if isinstance(logit, str):
                return Score.invalid(logit)
            raw.append(logit)
        if not all(math.isfinite(logit) for logit in raw):
            return Score.invalid(f"not_finite: the discriminator's score is {raw}")
        value = max(raw) if reduce == "max" else sum(raw) / len(raw)
        return Score(value=value, components={"polar": value}, ensemble=tuple(raw) if len(raw) > 1 else ())


def plan_group(
    group: Group, serialiser: Serialiser, max_references: int, max_length: int, unclosed_thinking: UnclosedThinking
) -> GroupPlan:
    """Serialise every response beside every reference used. `max_length`: tokens that the model takes."""
    question = prompt_text(group.prompt.messages)
    candidates = [without_thinking(sample.text, unclosed_thinking) for sample in group.samples]
    comparisons = []
    for reference in group.prompt.references[:max_references]:
        answer = without_thinking(reference, unclosed_thinking)
        encoded: dict[str, tuple[int, ...] | str] = {}
        for text in candidates:
            if text not in encoded:
                encoded[text] = _encode(serialiser, question, answer, text, max_length)
        comparisons.append(_compare([encoded[text] for text in candidates]))
    return GroupPlan(group, tuple(comparisons))


def _encode(
    serialiser: Serialiser, question: str, reference: str, candidate: str, max_length: int
) -> tuple[int, ...] | str:
    try:
        ids = tuple(serialiser.token_ids(serialiser.text(question, reference, candidate)))
    except SerialisationError as error:
        return f"serialisation: {error}"
    if len(ids) > max_length:
        return f"too_long: {len(ids)} tokens where the discriminator takes {max_length}"
    return ids


def _compare(encoded: Sequence[tuple[int, ...] | str]) -> Comparison:
    sequences = list(dict.fromkeys(ids for ids in encoded if not isinstance(ids, str)))
    place = {ids: index for index, ids in enumerate(sequences)}
    prefix = shared_prefix(sequences)
    return Comparison(
        prefix,
        tuple(ids[len(prefix) :] for ids in sequences),
        tuple(ids if isinstance(ids, str) else place[ids] for ids in encoded),
    )


def shared_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all sequences begin with."""
    if not sequences:
        return ()
    first, last = min(sequences), max(sequences)  # these two differ earliest
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
