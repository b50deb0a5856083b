"""Where the reference rewards of a prompt come from: a constant, a data column, or reference responses scored once."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewards.shaping.references import Float64
from rewards.shaping.steps import ReferenceStep
from rlkit.experience import Group, GroupScores, Prompt, Sample

CACHED_PROMPTS = 65536
"""Prompts whose reference rewards are remembered, the least recently used dropped first."""

ScoreGroups = Callable[[Sequence[Group]], Sequence[GroupScores | None]]


class ReferenceRewards:
    """Reference rewards for one reward; rewards of reference responses are remembered by the texts they are of."""

    def __init__(self, score: ScoreGroups) -> None:
        """`score` is what the samples' own rewards come from, before any shaping."""
        self._score = score
        self._cache: OrderedDict[str, Float64] = OrderedDict()

    def __call__(self, step: ReferenceStep, groups: Sequence[Group]) -> list[Float64 | str]:
        """For each group's prompt [N] rewards, N >= 1, or the reason why there are none."""
        if step.reference_value is not None:
            return [np.array([step.reference_value], dtype=np.float64) for _ in groups]
        if step.reference_rewards is not None:
            return [_numbers(group.prompt, step.reference_rewards, step.max_references) for group in groups]
        assert step.reference_responses is not None
        return self._scored(step.reference_responses, step.max_references, groups)

    def _scored(self, column: str, most: int, groups: Sequence[Group]) -> list[Float64 | str]:
        texts = [_texts(group.prompt, column, most) for group in groups]
        # Not by the prompt's id: a served reward sees several data sets, whose ids may be equal.
        keys = [_digest(group.prompt, found) for group, found in zip(groups, texts, strict=True)]
        wanted = {
            key: reference_group(group.prompt, found)
            for key, group, found in zip(keys, groups, texts, strict=True)
            if key not in self._cache and not isinstance(found, str)
        }
        failed = {key: found for key, found in zip(keys, texts, strict=True) if isinstance(found, str)}
        if wanted:
            for key, scores in zip(wanted, self._score(list(wanted.values())), strict=True):
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
    asked = [(message.role, message.content) for message in prompt.messages]
    return hashlib.blake2b(repr((asked, prompt.answer, prompt.references, texts)).encode(), digest_size=16).hexdigest()


def reference_group(prompt: Prompt, texts: Sequence[str]) -> Group:
    """Reference responses as a group that a reward can score by its texts; they have no tokens."""
    none = np.zeros(0)
    samples = tuple(
        Sample(
            index=index,
            token_ids=none.astype(np.int32),
            logprobs=none.astype(np.float32),
            text=text,
            finish_reason="stop",
            policy_versions=(0, 0),
            seed=0,
        )
        for index, text in enumerate(texts)
    )
    return Group(f"reference/{prompt.id}", prompt, samples)


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
    found: Any = prompt.references if column == "references" else prompt.columns.get(column)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return f"{column} of prompt {prompt.id} must be a text or a list of texts, not {found!r:.80}"
    return list(texts[:most]) if texts else f"{column} of prompt {prompt.id} is empty"


def _numbers(prompt: Prompt, column: str, most: int) -> Float64 | str:
    found = prompt.columns.get(column)
    numbers = list(found) if isinstance(found, list | tuple) else [found]
    usable = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not numbers or not usable:
        return f"{column} of prompt {prompt.id} must be a number or a list of numbers, not {found!r:.80}"
    return np.array(numbers[:most], dtype=np.float64)
