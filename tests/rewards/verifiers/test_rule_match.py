"""Exact and regex match."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rewards.base import RewardContext
from rewards.verifiers.match import ExactMatch, RegexMatch, find_answer
from rewards.verifiers.pool import CannotJudgeError
from rlkit.experience import Message, Prompt


def prompt(answer: str | None = None, references: tuple[str, ...] = (), **columns: object) -> Prompt:
    return Prompt("p", (Message("user", "?"),), (1,), references, answer, columns)


def exact(text: str, gold: str = "The Cat", **options: object) -> float | None:
    config = ExactMatch.Config(**options)
    return ExactMatch.judge(config, ExactMatch(config, RewardContext()).task(prompt(gold)), text).value


def regex(text: str, answer: str | None = None, **options: object) -> float | None:
    config = RegexMatch.Config(**options)
    return RegexMatch.judge(config, RegexMatch(config, RewardContext()).task(prompt(answer)), text).value


def test_where_the_answer_is() -> None:
    text = "<think>x</think><answer>old</answer> then <answer>\nnew </answer> #### 42."
    assert find_answer(text, "answer_tag") == "new"
    assert find_answer(text, "final_answer") == "42"
    assert find_answer(" all of it\n", "response") == "all of it"
    assert find_answer("no tags", "answer_tag") is None
    assert find_answer("</answer> <answer>", "answer_tag") is None


@pytest.mark.parametrize(
    ("text", "options", "value"),
    [
        ("The Cat", {}, 1.0),
        (" The \n Cat ", {}, 1.0),
        ("the cat", {}, 0.0),
        ("the cat", {"ignore_case": True}, 1.0),
        ("The Cat.", {}, 0.0),
        ("The Cat.", {"ignore_punctuation": True}, 1.0),
        ("cat", {"ignore_case": True, "ignore_articles": True}, 1.0),
        ("The Cats", {"ignore_case": True, "ignore_articles": True, "ignore_punctuation": True}, 0.0),
        ("The Cat sat", {}, 0.0),
    ],
)
def test_exact_match_of_whole_responses(text: str, options: dict[str, object], value: float) -> None:
    assert exact(text, answer_in="response", **options) == value


def test_exact_match_of_final_answers() -> None:
    assert exact("Well.\n#### 42", gold="6 * 7 = 42\n#### 42") == 1.0
    assert exact("Well.\n#### 42.0", gold="42") == 1.0
    assert exact("Well.\n#### 41", gold="42") == 0.0
    assert exact("Well, 42", gold="42") == 0.0
    assert exact("<answer>The Cat</answer>", answer_in="answer_tag") == 1.0


def test_exact_match_of_any_reference() -> None:
    config = ExactMatch.Config(gold="references", answer_in="response")
    reward = ExactMatch(config, RewardContext())
    task = reward.task(prompt(references=("NYC", "New York City")))
    assert [ExactMatch.judge(config, task, text).value for text in ("NYC", "New York City", "York")] == [1.0, 1.0, 0.0]
    assert ExactMatch.traits(config).references
    assert not ExactMatch.traits(config).answer
    with pytest.raises(CannotJudgeError, match=r"^no_gold: "):
        reward.task(prompt("NYC"))


@pytest.mark.parametrize(
    ("text", "options", "value"),
    [
        ("I say 42.", {"pattern": r"\d+"}, 1.0),
        ("I say so.", {"pattern": r"\d+"}, 0.0),
        ("I say 42.", {"pattern": r"\d+", "whole": True}, 0.0),
        ("42", {"pattern": r"\d+", "whole": True}, 1.0),
        ("HELLO", {"pattern": "(?i)hello"}, 1.0),
        ("x <answer>42</answer>", {"pattern": r"\d\d", "whole": True, "answer_in": "answer_tag"}, 1.0),
        ("no tag 42", {"pattern": r"\d\d", "answer_in": "answer_tag"}, 0.0),
    ],
)
def test_regex_match(text: str, options: dict[str, object], value: float) -> None:
    assert regex(text, **options) == value


def test_the_gold_answer_in_a_pattern_is_taken_literally() -> None:
    assert regex("result: (a+b)", answer="(a+b)", pattern="result: {answer}$") == 1.0
    assert regex("result: aab", answer="(a+b)", pattern="result: {answer}$") == 0.0
    assert RegexMatch.traits(RegexMatch.Config(pattern="x{answer}")).answer
    assert not RegexMatch.traits(RegexMatch.Config(pattern="x{2}")).answer
    with pytest.raises(CannotJudgeError, match=r"^no_gold: "):
        regex("x", pattern="{answer}")


def test_patterns_from_a_column() -> None:
    config = RegexMatch.Config(pattern_column="pattern")
    reward = RegexMatch(config, RewardContext())
    assert RegexMatch.traits(config).columns == ("pattern",)
    assert reward.task(prompt(pattern="[ab]+")) == "[ab]+"
    for columns, reason in (({}, "no_column"), ({"pattern": 3}, "no_column"), ({"pattern": "(("}, "bad_pattern")):
        with pytest.raises(CannotJudgeError, match=f"^{reason}: "):
            reward.task(prompt(**columns))


def test_options_that_contradict_each_other_or_do_not_compile_are_refused() -> None:
    for options in ({}, {"pattern": "a", "pattern_column": "b"}):
        with pytest.raises(ValidationError, match="set one of"):
            RegexMatch.Config(**options)
    assert "does not" not in str(RegexMatch.check(RegexMatch.Config(pattern="a{answer}")))
    (message,) = RegexMatch.check(RegexMatch.Config(pattern="(a"))
    assert "reward.pattern='(a'" in message
