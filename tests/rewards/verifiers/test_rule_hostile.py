"""Every rule on texts made to hang, grow or crash it: a deadline, the worst score, and the neighbours judged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.verifiers.pool import TextRule
from rlkit.config.parts import import_part
from rlkit.experience import Score

DEEP = "[" * 200_000
HUGE = "word " * 400_000
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "choice.MultipleChoice": ({}, {}, "Answer: B"),
    "match.ExactMatch": ({}, {}, "#### B"),
    "match.RegexMatch": ({"pattern": r"B$"}, {}, "B"),
    "match.TagFormat": ({}, {}, "<think>a</think><answer>B</answer>"),
    "tool_call.ToolCallMatch": ({}, {"tool_calls": [{"name": "f"}]}, '<tool_call>{"name": "f"}</tool_call>'),
    "instructions.Instructions": ({"always": [{"id": "punctuation:no_comma"}]}, {}, "fine"),
    "json_schema.JsonSchema": ({}, {"json_schema": {"type": "integer"}}, "3"),
}


def started(kind: str, options: Mapping[str, Any]) -> TextRule:
    cls = import_part("reward", f"rewards.verifiers.{kind}")
    reward: TextRule = cls(cls.Config(**{"item_timeout_seconds": 2.0, **options}), RewardContext())
    reward.start()
    return reward


def scores(reward: TextRule, columns: Mapping[str, Any], *texts: str) -> tuple[Score, ...]:
    group = make_group("g", texts, answer="B")
    (found,) = reward.score([replace(group, prompt=replace(group.prompt, columns=dict(columns)))])
    return found.samples


@pytest.mark.parametrize("kind", KINDS)
def test_deep_huge_and_strange_texts_end_in_a_score(kind: str) -> None:
    options, columns, good = KINDS[kind]
    reward = started(kind, options)
    try:
        nested = f"<tool_call>{DEEP}</tool_call>" if "tool_call" in kind else DEEP
        texts = (good, nested, HUGE, "<think>" * 50_000, "\x00\ud800\u202e", "```" * 50_000, good)
        start = time.perf_counter()
        first, *hostile, last = scores(reward, columns, *texts)
        assert time.perf_counter() - start < 30
        assert first.value == last.value and first.value is not None and first.value > 0
        assert all(score.valid for score in hostile), "nothing that a policy writes escapes a verdict"
        assert all(len(score.trace) < 2000 for score in hostile)
    finally:
        reward.close()


def test_json_that_is_too_deep_is_wrong() -> None:
    reward = started("json_schema.JsonSchema", {})
    good, deep = scores(reward, {"json_schema": {"type": "integer"}}, "3", DEEP)
    reward.close()
    assert (good.value, deep.value) == (1.0, 0.0)
    assert "RecursionError" in deep.trace


def test_a_schema_with_a_reference_to_nowhere_makes_the_sample_invalid() -> None:
    reward = started("json_schema.JsonSchema", {})
    (score,) = scores(reward, {"json_schema": {"$ref": "#/nowhere"}}, "3")
    reward.close()
    assert score.reason.startswith("bad_schema: a reference cannot be resolved")


@pytest.mark.parametrize(
    ("kind", "options", "columns", "good"),
    [
        ("match.RegexMatch", {"pattern": r"^(a|aa)+$|B"}, {}, "B"),
        ("match.RegexMatch", {"pattern_column": "pattern"}, {"pattern": r"^(a+)+$|B"}, "B"),
        ("json_schema.JsonSchema", {}, {"json_schema": {"pattern": "^(a|aa)+$"}}, '"aa"'),
    ],
)
def test_a_pattern_that_explodes_is_killed_and_only_its_sample_is_wrong(
    kind: str, options: dict[str, Any], columns: dict[str, Any], good: str
) -> None:
    reward = started(kind, {"item_timeout_seconds": 1.0, **options})
    bomb = "a" * 200 + "!"
    start = time.perf_counter()
    found = scores(reward, columns, good, f'"{bomb}"' if "json" in kind else bomb, good)
    assert time.perf_counter() - start < 10
    reward.close()
    assert [score.value for score in found] == [1.0, 0.0, 1.0]
    assert "timeout: " in found[1].trace


def test_a_call_ends_within_its_budget() -> None:
    options = {"pattern": r"^(a|aa)+$", "item_timeout_seconds": 2.0, "timeout_seconds": 3.0}
    reward = started("match.RegexMatch", options)
    start = time.perf_counter()
    found = scores(reward, {}, *["a" * 200 + "!"] * 5)
    assert time.perf_counter() - start < 6
    reward.close()
    assert all(score.value == 0.0 or score.reason.startswith("timeout: the verifier's time") for score in found)


def test_many_predicted_calls_are_assigned_in_time() -> None:
    gold = [{"name": "f", "parameters": {"a": number}} for number in range(8)]
    reward = started("tool_call.ToolCallMatch", {"item_timeout_seconds": 10.0})
    calls = "\n".join(json.dumps({"name": "f", "parameters": {"a": number}}) for number in range(2000))
    (score,) = scores(reward, {"tool_calls": gold}, f"<tool_call>\n{calls}\n</tool_call>")
    reward.close()
    assert score.valid


def test_a_prompt_without_what_is_needed_is_invalid_and_its_neighbour_is_judged() -> None:
    reward = started("tool_call.ToolCallMatch", {})
    call = '<tool_call>{"name": "f"}</tool_call>'
    groups = [make_group("bare", [call, call]), make_group("full", [call])]
    groups[1] = replace(groups[1], prompt=replace(groups[1].prompt, columns={"tool_calls": [{"name": "f"}]}))
    bare, full = reward.score(groups)
    reward.close()
    assert [score.reason.split(":")[0] for score in bare.samples] == ["no_column", "no_column"]
    assert full.samples[0].value == 3.0


@pytest.mark.parametrize("kind", [*KINDS, "math.MathReward", "terms.Length"])
def test_importing_is_cheap(kind: str) -> None:
    module = f"rewards.verifiers.{kind.partition('.')[0]}"
    heavy = "('torch', 'transformers', 'ray', 'math_verify', 'pebble', 'jsonschema', 'py3langid')"
    script = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
