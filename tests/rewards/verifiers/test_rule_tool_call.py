"""Tool calls against gold ones: the oracle of ToolRL, its layout, and the assignment."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.base import RewardContext
from rewards.verifiers.pool import CannotJudgeError
from rewards.verifiers.tool_call import (
    ToolCall,
    ToolCallMatch,
    best_assignment,
    canonical,
    match_share,
    predicted_calls,
    read_call,
    similarity,
)
from rlkit.experience import Message, Prompt, Score


def call(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


def answer(*calls: dict[str, Any], think: str = "<think>hm</think>\n") -> str:
    return f"{think}<tool_call>\n" + "\n".join(json.dumps(each) for each in calls) + "\n</tool_call>"


def judge(text: str, gold: Any, **options: Any) -> Score:
    config = ToolCallMatch.Config(**options)
    prompt = Prompt("p", (Message("user", "?"),), (1,), columns={"tool_calls": gold})
    return ToolCallMatch.judge(config, ToolCallMatch(config, RewardContext()).task(prompt), text)


def test_the_oracle() -> None:
    """gold get(a=1, b=2), predicted get(a=1, c=2): names 1, argument names 1/3, arguments 1 of S_max 4."""
    gold, predicted = read_call(call("get", a=1, b=2)), read_call(call("get", a=1, c=2))
    assert match_share([gold], [predicted]) * 4 == pytest.approx(2.333333, abs=1e-6)
    score = judge(answer(call("get", a=1, c=2)), [call("get", a=1, b=2)])
    assert score.components == pytest.approx({"format": 1.0, "correctness": 0.5})
    assert score.value == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("text", "gold", "correctness"),
    [
        (answer(call("get", a=1)), [call("get", a=1)], 3.0),
        (answer(call("get", a=1.0)), [call("get", a=1)], 3.0),
        (answer(call("get", a=True)), [call("get", a=1)], 6 * 2 / 3 - 3),
        (answer(call("put", a=1)), [call("get", a=1)], -3.0),
        (answer(call("get")), [call("get", a=1)], 6 * 1 / 3 - 3),
        (answer(call("get")), [call("get")], 3.0),
        (answer(call("get", a=1), call("get", a=1)), [call("get", a=1)], 6 * 2.5 / 3 - 3),
        (answer(call("b"), call("a")), [call("a"), call("b")], 3.0),
        ("no call at all", [call("get", a=1)], -3.0),
        ("<tool_call>{broken</tool_call>", [call("get", a=1)], -3.0),
        ('<tool_call>{"name": "get"}', [call("get", a=1)], -3.0),
        ('<tool_call>{"name": 3}</tool_call>', [call("get", a=1)], -3.0),
        ('<tool_call>{"name": "get", "parameters": [1]}</tool_call>', [call("get", a=1)], -3.0),
        ("free text", [], 0.0),
        (answer(call("get", a=1)), [], 0.0),
        (answer(call("get", a={"x": [1, 2]})), [call("get", a={"x": [1, 2]})], 3.0),
    ],
)
def test_correctness(text: str, gold: Any, correctness: float) -> None:
    assert judge(text, gold).components["correctness"] == pytest.approx(correctness)


CALL = '<tool_call>\n{"name": "get", "parameters": {}}\n</tool_call>'
TOOLRL_BOTH = f"<think>x</think>\n{CALL}\n<response>wait</response>"


@pytest.mark.parametrize(
    ("text", "gold", "good"),
    [
        (f"<think>x</think>\n{CALL}", [call("get")], True),
        (f" <think>x</think>\n\n{CALL}\n", [call("get")], True),
        (CALL, [call("get")], False),
        (f"{CALL}\n<think>x</think>", [call("get")], False),
        (f"<think>x</think>\n{CALL}\nDone.", [call("get")], False),
        (f"<think>x</think>\n{CALL}\n{CALL}", [call("get")], False),
        (f"<think>x<think>y</think>\n{CALL}", [call("get")], False),
        (f"<think>x</think>\n{CALL}\n<response>a</response>", [call("get")], False),
        (f"<think>x</think>\n{CALL}\n<response>a</response>", TOOLRL_BOTH, True),
        (f"<think>x</think>\n<response>a</response>\n{CALL}", TOOLRL_BOTH, False),
        (f"<think>x</think>\n{CALL}", TOOLRL_BOTH, False),
        ("<think>x</think>\n<response>a</response>", "<think>y</think>\n<response>b</response>", True),
        ("<think>x</think>\na", "<think>y</think>\n<response>b</response>", False),
        ("<think>x</think>\na", [], True),
        ("<think>x</think>", [], True),
        ("a", [], False),
        (f"<think>x</think>\n{CALL}", [], False),
    ],
)
def test_layout(text: str, gold: Any, good: bool) -> None:
    assert judge(text, gold).components["format"] == float(good)


def test_layout_options() -> None:
    assert judge(CALL, [call("get")], think=False).value == 4.0
    two = f"<think>x</think>\n{CALL}\n{CALL}"
    assert judge(two, [call("get"), call("get")]).value == 3.0
    assert judge(two, [call("get"), call("get")], many_blocks=True).value == 4.0


def test_scales_and_all_or_nothing() -> None:
    text, gold = answer(call("get", a=1, c=2)), [call("get", a=1, b=2)]
    assert judge(text, gold, correctness_scale=1.0, format_scale=0.0).value == pytest.approx(0.5 / 3)
    assert judge(text, gold, all_or_nothing=True).components["correctness"] == -3.0
    assert judge(answer(*gold), gold, all_or_nothing=True).components["correctness"] == 3.0


def test_optimal_and_greedy_assignment_differ_where_order_misleads() -> None:
    # The first gold call likes the second prediction best, which is the second gold call's only good one.
    gold = [call("get", a=1, b=2), call("get", a=1, b=2, c=3)]
    text = answer(call("get", a=1, b=9), call("get", a=1, b=2, c=3))
    greedy, optimal = judge(text, gold, assignment="greedy"), judge(text, gold)
    assert greedy.components["correctness"] == pytest.approx(6 * (1 + (2 / 3 + 2) + (2 / 3 + 1)) / 8 - 3)
    assert optimal.components["correctness"] == pytest.approx(6 * (1 + (1 + 1) + (1 + 3)) / 8 - 3)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda rows: st.integers(0, 5).flatmap(
            lambda columns: st.lists(
                st.lists(st.integers(0, 9).map(float), min_size=columns, max_size=columns), min_size=rows, max_size=rows
            )
        )
    )
)
def test_the_assignment_is_the_best_of_all(scores: list[list[float]]) -> None:
    rows, columns = len(scores), len(scores[0])
    padded = [[*row, *([0.0] * rows)] for row in scores]
    everything = itertools.permutations(range(columns + rows), rows)
    best = max(sum(padded[row][column] for row, column in enumerate(chosen)) for chosen in everything)
    assert best_assignment(scores) == pytest.approx(best)


def test_no_gold_rows_and_similarity() -> None:
    assert best_assignment([]) == 0.0
    assert match_share([], []) == 1.0
    assert similarity([], []) == 1.0
    assert similarity(["a"], []) == 0.0
    assert similarity(["a", "a"], ["a"]) == 0.5


def test_forms_in_which_calls_are_written() -> None:
    wanted = ToolCall("get", {"a": "1"})
    assert read_call(call("get", a=1)) == wanted
    assert read_call({"name": "get", "arguments": {"a": 1}}) == wanted
    assert read_call({"type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}) == wanted
    assert read_call({"name": "get"}) == ToolCall("get", {})
    text = '<think><tool_call>no</tool_call></think><tool_call>[{"name": "a"}, {"name": "b"}]</tool_call>'
    assert [each.name for each in predicted_calls(text)] == ["a", "b"]
    assert canonical({"b": 1.0, "a": [True]}) == '{"a": [true], "b": 1}'


def test_gold_that_cannot_be_used() -> None:
    for gold, reason in ((None, "no_column"), (3, "bad_column"), (["x"], "bad_column"), ("[{", "bad_column")):
        with pytest.raises(CannotJudgeError, match=f"^{reason}: "):
            judge("x", gold)
    assert judge("<think>x</think> fine", "").value == 1.0
    assert judge(answer(call("get")), json.dumps([call("get")])).value == 4.0
    assert ToolCallMatch.traits(ToolCallMatch.Config(tool_calls_column="gold")).columns == ("gold",)
