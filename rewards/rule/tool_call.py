"""`reward=tool_call`: the tool calls of a response against gold ones, as in ToolRL (arXiv 2504.13958)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from rewards.base import RewardNeeds
from rewards.rule.call_matching import Assignment, ToolCall, match_share, read_call
from rewards.rule.text_rule import CannotJudgeError, TextRule, TextRuleConfig, column_value, excerpt
from rlkit.experience import Prompt, Score

_CALL = "tool_call"


@dataclass(frozen=True, slots=True)
class GoldCalls:
    """What the response should contain."""

    calls: tuple[ToolCall, ...]
    layout: tuple[str, ...]
    """Tags in order."""


class ToolCallMatch(TextRule):
    """value = format (0 to `format_scale`) + correctness (-`correctness_scale` to `correctness_scale`).

    format is earned by the layout that the gold implies: <think>, then <tool_call>, then <response>, each once.
    correctness is 2 S / S_max - 1 times its scale, S counting equal tool names, argument names and arguments; calls
    that cannot be read give its minimum; where the gold has no calls it is 0. With the default scales: -3 to 4.
    """

    class Config(TextRuleConfig):
        """Options of the tool call reward."""

        tool_calls_column: str = "tool_calls"
        """Column with the gold calls: a list of {name, parameters or arguments}, its JSON text, or a ToolRL answer with
        <tool_call> and <response> tags. An empty list or text: no call is wanted."""
        correctness_scale: float = Field(default=3.0, ge=0)
        """Correctness lies between minus this and this."""
        format_scale: float = Field(default=1.0, ge=0)
        """What the right layout adds."""
        assignment: Assignment = "optimal"
        """Which predicted call is compared with which gold one; greedy (in gold order) is the authors' way."""
        all_or_nothing: bool = False
        """Correctness is its maximum for exactly the gold calls, in their order, and its minimum for all else."""
        think: bool = True
        """The layout starts with a <think> block."""
        many_blocks: bool = False
        """Several <tool_call> blocks are good layout (Hermes and Qwen templates write one per call)."""

    @classmethod
    def needs(cls, config: Any) -> RewardNeeds:
        """The gold calls."""
        return RewardNeeds(columns=(config.tool_calls_column,))

    def task(self, prompt: Prompt) -> GoldCalls:
        """The gold calls and the layout they imply."""
        value = column_value(prompt, self.config.tool_calls_column)
        tags: tuple[str, ...] = ("think",) if self.config.think else ()
        try:
            if isinstance(value, str):
                tags += tuple(tag for tag in (_CALL, "response") if f"<{tag}>" in value)
                return GoldCalls(predicted_calls(value) if f"<{_CALL}>" in value else (), tags)
            calls = tuple(read_call(call) for call in ([value] if isinstance(value, Mapping) else value))
        except (TypeError, ValueError, RecursionError) as error:
            column = self.config.tool_calls_column
            raise CannotJudgeError(f"bad_column: column {column!r} holds no tool calls: {error}") from error
        return GoldCalls(calls, (*tags, _CALL) if calls else tags)

    @staticmethod
    def judge(config: Any, task: GoldCalls, text: str, /) -> Score:
        """Components: `format` and `correctness`, both as they are added."""
        laid_out = has_layout(text, task.layout, config.many_blocks)
        share, trace = 0.5, "no call wanted"
        if task.calls:
            share, trace = _share(text, task.calls, config)
        components = {
            "format": config.format_scale * laid_out,
            "correctness": config.correctness_scale * (2.0 * share - 1.0),
        }
        return Score(sum(components.values()), components=components, trace=trace)


def predicted_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls in all <tool_call> blocks after the thinking: JSON (an object or a list), or one object per line.

    Raises ValueError if there is no block, or one that cannot be read.
    """
    pieces = text.rpartition("</think>")[2].split(f"<{_CALL}>")[1:]
    if not pieces:
        raise ValueError("there is no <tool_call>")
    calls: list[ToolCall] = []
    for piece in pieces:
        block, end, _ = piece.partition(f"</{_CALL}>")
        if not end:
            raise ValueError("a <tool_call> is not closed")
        calls += [read_call(value) for value in _json_values(block)]
    return tuple(calls)


def has_layout(text: str, layout: tuple[str, ...], many_blocks: bool) -> bool:
    """Whether the text consists of these tagged blocks, in order, each tag once and no other one of the three.

    Without <response> in the layout, text without tags may follow <think> only if no call is wanted.
    """
    rest = text.strip()
    for place, tag in enumerate(layout):
        blocks = 0
        while rest.startswith(f"<{tag}>") and (blocks == 0 or (tag == _CALL and many_blocks)):
            inside, end, rest = rest.removeprefix(f"<{tag}>").partition(f"</{tag}>")
            rest = rest.lstrip()
            blocks += 1
            if not end or any(f"<{name}>" in inside for name in ("think", _CALL, "response")):
                return False
        if not blocks:
            return False
        if place == len(layout) - 1 and tag != "think":
            return rest == ""
    return not any(mark in rest for name in ("think", _CALL, "response") for mark in (f"<{name}>", f"</{name}>"))


def _share(text: str, gold: tuple[ToolCall, ...], config: Any) -> tuple[float, str]:
    try:
        calls = predicted_calls(text)
    except ValueError as error:
        return 0.0, f"unreadable: {str(error)[:200]}"
    if config.all_or_nothing:
        share = float(calls == gold)
    else:
        share = match_share(gold, calls, config.assignment)
    shown = "; ".join(f"{call.name}({', '.join(f'{k}={v}' for k, v in call.arguments.items())})" for call in calls[:8])
    return share, f"called {excerpt(shown)}, match {share:.3f}"


def _json_values(block: str) -> list[Any]:
    try:
        value = json.loads(block)
    except ValueError:
        return [json.loads(line) for line in block.splitlines() if line.strip()]
    return value if isinstance(value, list) else [value]
