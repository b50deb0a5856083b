"""Layout in tags, length and repetition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from reward_samples import make_group, make_sample

from rewards.base import RewardContext
from rewards.verifiers.match import TagFormat
from rewards.verifiers.terms import GroupLength, Length, Repetition, repeated_ngrams
from rlkit.experience import Group, Score

GOOD = "<think>6 * 7</think>\n<answer>42</answer>"


def layout(text: str, **options: object) -> Score:
    return TagFormat.judge(TagFormat.Config(**options), None, text)


@pytest.mark.parametrize(
    ("text", "value", "share"),
    [
        (GOOD, 1.0, 1.0),
        (f"  {GOOD}\n", 1.0, 1.0),
        ("<answer>42</answer><think>x</think>", 0.0, 1.0),
        ("<think>x<answer>42</answer></think>", 0.0, 1.0),
        (f"Well. {GOOD}", 0.0, 1.0),
        (f"{GOOD} So there.", 0.0, 1.0),
        ("<think>x</think> so <answer>42</answer>", 0.0, 1.0),
        ("<think> </think><answer>42</answer>", 0.0, 1.0),
        (f"{GOOD}<answer>43</answer>", 0.0, 0.5),
        ("<think>x</think>", 0.0, 0.5),
        ("<think>x</think><answer>42", 0.0, 0.75),
        ("x</think><answer>42</answer>", 0.0, 0.75),
        ("42", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_tags(text: str, value: float, share: float) -> None:
    score = layout(text)
    assert (score.value, score.components["tag_count"]) == (value, share)
    assert layout(text, grade="tag_count").value == share
    assert score.trace


def test_tag_options() -> None:
    assert layout(f"Well. {GOOD} Done.", text_outside=True).value == 1.0
    assert layout("<think></think><answer>42</answer>", empty_tags=True).value == 1.0
    swapped = "<answer>42</answer> <think>x</think>"
    assert layout(swapped, text_outside=True, empty_tags=True).value == 0.0
    assert layout("x</think><answer>42</answer>", opened_by_prompt=True).value == 1.0
    assert layout(GOOD, opened_by_prompt=True).value == 0.0
    assert layout("<plan>a</plan><code>b</code><test>c</test>", tags=("plan", "code", "test")).value == 1.0
    assert layout("<plan>a</plan><test>c</test><code>b</code>", tags=("plan", "code", "test")).value == 0.0
    for tags in ((), ("<think>",), ("a b",)):
        with pytest.raises(ValidationError):
            TagFormat.Config(tags=tags)


def group(*lengths: int) -> Group:
    return make_group("g", ["word " * length for length in lengths])


def values(reward: Length | GroupLength | Repetition, given: Group) -> list[float | None]:
    (scores,) = reward.score([given])
    assert all(score.trace for score in scores.samples)
    return [score.value for score in scores.samples]


def test_length() -> None:
    reward = Length(Length.Config(min_tokens=4, max_tokens=8, slope_tokens=4), RewardContext())
    assert values(reward, group(1, 3, 4, 8, 9, 11, 12, 50)) == [0.25, 0.75, 1.0, 1.0, 0.75, 0.25, 0.0, 0.0]
    target = Length(Length.Config(min_tokens=5, max_tokens=5, slope_tokens=5), RewardContext())
    assert values(target, group(5, 6, 4)) == [1.0, 0.8, 0.8]
    for options in ({}, {"min_tokens": 5, "max_tokens": 4}):
        with pytest.raises(ValidationError, match="max_tokens"):
            Length.Config(**options)


def test_only_the_policys_own_tokens_count() -> None:
    sample = make_sample(0, "a b c d")
    masked = replace(sample, mask=np.array([True, False, False, True]))
    reward = Length(Length.Config(max_tokens=2, slope_tokens=4), RewardContext())
    given = replace(group(1), samples=(sample, masked))
    assert values(reward, given) == [0.5, 1.0]


def test_length_within_the_group() -> None:
    reward = GroupLength(GroupLength.Config(), RewardContext())
    assert values(reward, group(2, 4, 6)) == [1.0, 0.5, 0.0]
    assert values(reward, group(3, 3)) == [0.5, 0.5]
    assert values(reward, group(3)) == [0.5]


def test_repeated_ngrams_by_hand() -> None:
    assert repeated_ngrams([1, 2, 3, 4], 2) == (3, 0)
    assert repeated_ngrams([1, 2, 1, 2, 1], 2) == (4, 2)
    assert repeated_ngrams([7, 7, 7, 7, 7], 2) == (4, 3)
    assert repeated_ngrams([1, 2], 3) == (0, 0)


def test_repetition() -> None:
    sample = make_sample(0, "x")
    tokens = ([1, 2, 3, 4, 5, 6], [1, 2, 1, 2, 1, 2, 1], [9] * 101, [1])
    samples = tuple(
        replace(sample, token_ids=np.array(ids, np.int32), logprobs=np.zeros(len(ids), np.float32)) for ids in tokens
    )
    reward = Repetition(Repetition.Config(ngram_tokens=2), RewardContext())
    assert values(reward, replace(group(1), samples=samples)) == pytest.approx([1.0, 2 / 6, 0.01, 1.0])
