"""`reward=tool_call`: how well a response's tool calls match the gold calls, as in ToolRL (arXiv 2504.13958)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from rewards.base import RewardTraits
from rewards.verifiers.pool import CannotJudgeError, TextRule, TextRuleConfig, column_value, excerpt
from rlkit.experience import Prompt, Score

Assignment = Literal["optimal", "greedy"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call; its arguments are canonical JSON (1 equals 1.0 but not true)."""

    name: str
    arguments: Mapping[str, str]


def read_call(value: Any) -> ToolCall:
    """Read `{name, parameters}` or `{name, arguments}`, also below `function` (OpenAI). Raise ValueError otherwise."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("a tool call is an object with a name")
    arguments = value.get("parameters", value.get("arguments"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {value['name'][:50]} are not an object")
    return ToolCall(value["name"], {str(key): canonical(argument) for key, argument in arguments.items()})


def canonical(value: Any) -> str:
    """Return a text that is equal for values equal as JSON. Raise ValueError for NaN and infinities."""
    return json.dumps(_integral(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def similarity(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Multiset intersection / union; 1 for equal lists, including empty ones."""
    if list(gold) == list(predicted):
        return 1.0
    common = sum((Counter(gold) & Counter(predicted)).values())
    union = len(gold) + len(predicted) - common
    return common / union


def pair_score(gold: ToolCall, predicted: ToolCall) -> float:
    """Similarity of argument names plus the number of equal arguments; 0 for a different tool."""
    if gold.name != predicted.name:
        return 0.0
    equal = sum(predicted.arguments.get(key) == value for key, value in gold.arguments.items())
    return similarity(list(gold.arguments), list(predicted.arguments)) + equal


def match_share(gold: Sequence[ToolCall], predicted: Sequence[ToolCall], assignment: Assignment = "optimal") -> float:
    """S / S_max, 0 to 1: `S = J(names) + sum of pair scores`, `S_max = 1 + sum over gold of (1 + #arguments)`.

    optimal: the assignment with the largest sum; greedy: each gold call in order takes the best unused one (the
    released code).
    """
    if list(gold) == list(predicted):
        return 1.0
    names = similarity([call.name for call in gold], [call.name for call in predicted])
    scores = [[pair_score(left, right) for right in predicted] for left in gold]
    matched = best_assignment(scores) if assignment == "optimal" else _greedy(scores)
    most = 1.0 + sum(1.0 + len(call.arguments) for call in gold)
    return (names + matched) / most


def best_assignment(scores: Sequence[Sequence[float]]) -> float:
    """Largest sum of entries (none negative) with at most one in each row and column.

    Kuhn's method with potentials (Munkres), row by row: O(rows^2 x columns). A row may take a column of zeros.
    """
    rows = len(scores)
    columns = (len(scores[0]) if rows else 0) + rows
    costs = [[-score for score in row] + [0.0] * rows for row in scores]
    row_of = [-1] * (columns + 1)  # the row that each column is assigned to; the last entry is the row being assigned
    row_price, column_price = [0.0] * rows, [0.0] * (columns + 1)
    for row in range(rows):
        row_of[columns] = row
        column = columns
        slack, came_from, visited = [float("inf")] * columns, [columns] * columns, [False] * (columns + 1)
        while row_of[column] != -1:
            visited[column] = True
            current = row_of[column]
            for other in range(columns):
                reduced = costs[current][other] - row_price[current] - column_price[other]
                if not visited[other] and reduced < slack[other]:
                    slack[other], came_from[other] = reduced, column
            nearest = min((other for other in range(columns) if not visited[other]), key=slack.__getitem__)
            step = slack[nearest]
            for other in range(columns + 1):
                if visited[other]:
                    row_price[row_of[other]] += step
                    column_price[other] -= step
                elif other < columns:
                    slack[other] -= step
            column = nearest
        while column != columns:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    assigned = [(row_of[column], column) for column in range(columns - rows) if row_of[column] != -1]
    return sum((scores[row][column] for row, column in assigned), 0.0)


def _greedy(scores: Sequence[Sequence[float]]) -> float:
    total, used = 0.0, set[int]()
    for row in scores:
        free = [column for column in range(len(row)) if column not in used and row[column] > 0]
        if free:
            best = max(free, key=row.__getitem__)
            used.add(best)
            total += row[best]
    return total


def _integral(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _integral(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_integral(inner) for inner in value]
    return value


_CALL = "tool_call"


@dataclass(frozen=True, slots=True)
class GoldCalls:
    calls: tuple[ToolCall, ...]
    layout: tuple[str, ...]


class ToolCallMatch(TextRule):
    """value = format (0 to `format_scale`) + correctness (-`correctness_scale` to `correctness_scale`).

    format: for the layout that the gold calls imply: <think>, <tool_call>, <response>, each once. correctness: its
    scale times 2 S / S_max - 1, where S counts equal tool names, argument names and arguments; the minimum for
    unreadable calls, 0 if there are no gold calls.
    """

    class Config(TextRuleConfig):
        tool_calls_column: str = "tool_calls"
        """Column with the gold calls: a list of {name, parameters or arguments}, its JSON text, or a ToolRL answer with
        <tool_call> and <response> tags; empty: no call is expected."""
        correctness_scale: float = Field(default=3.0, ge=0)
        """Correctness ranges from minus this to plus this."""
        format_scale: float = Field(default=1.0, ge=0)
        """Added for the right layout."""
        assignment: Assignment = "optimal"
        """How predicted calls are paired with gold ones; greedy (in gold order) is the authors' method."""
        all_or_nothing: bool = False
        """Maximum correctness for exactly the gold calls, in order; the minimum for anything else."""
        think: bool = True
        """The layout starts with a <think> block."""
        many_blocks: bool = False
        """Allow several <tool_call> blocks (as Hermes and Qwen templates write them)."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(columns=(config.tool_calls_column,), uses_gpu=False)

    def task(self, prompt: Prompt) -> GoldCalls:
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
    """Return the calls in all <tool_call> blocks after the thinking: a JSON object or list, or one object per line.

    Raise ValueError if there is no readable block.
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
    """Whether the text has exactly these tagged blocks, in order, each tag once and none of the three tags besides.

    Without <response> in the layout, untagged text may follow <think> only if no call is expected.
    """
    rest = text.strip()
    for index, tag in enumerate(layout):
        blocks = 0
        while rest.startswith(f"<{tag}>") and (blocks == 0 or (tag == _CALL and many_blocks)):
            inside, end, rest = rest.removeprefix(f"<{tag}>").partition(f"</{tag}>")
            rest = rest.lstrip()
            blocks += 1
            if not end or any(f"<{name}>" in inside for name in ("think", _CALL, "response")):
                return False
        if not blocks:
            return False
        if index == len(layout) - 1 and tag != "think":
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
