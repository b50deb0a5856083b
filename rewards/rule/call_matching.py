"""How well predicted tool calls match gold ones: the correctness part of ToolRL (arXiv 2504.13958). Pure functions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Assignment = Literal["optimal", "greedy"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool's name and its arguments, each as canonical JSON (so that 1 is 1.0 and not true)."""

    name: str
    arguments: Mapping[str, str]


def read_call(value: Any) -> ToolCall:
    """From `{name, parameters}` or `{name, arguments}`, also below `function` (OpenAI). Raises ValueError otherwise."""
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
        raise ValueError(f"the arguments of {value['name'][:50]} are no object")
    return ToolCall(value["name"], {str(key): canonical(argument) for key, argument in arguments.items()})


def canonical(value: Any) -> str:
    """Equal for values that are equal as JSON. Raises ValueError for NaN and infinities."""
    return json.dumps(_integral(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def similarity(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Multiset overlap / union; 1 for equal lists, also empty ones."""
    if list(gold) == list(predicted):
        return 1.0
    common = sum((Counter(gold) & Counter(predicted)).values())
    union = len(gold) + len(predicted) - common
    return common / union


def pair_score(gold: ToolCall, predicted: ToolCall) -> float:
    """Similarity of the argument names plus the number of equal arguments; 0 for another tool."""
    if gold.name != predicted.name:
        return 0.0
    equal = sum(predicted.arguments.get(key) == value for key, value in gold.arguments.items())
    return similarity(list(gold.arguments), list(predicted.arguments)) + equal


def match_share(gold: Sequence[ToolCall], predicted: Sequence[ToolCall], assignment: Assignment = "optimal") -> float:
    """S / S_max, 0 to 1: `S = J(names) + sum of pair scores`, `S_max = 1 + sum over gold of (1 + #arguments)`.

    Equal lists give 1. optimal: the assignment of predicted to gold calls with the largest sum; greedy: each gold
    call in its order takes the best unused one, as the released code does.
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

    Kuhn's method with potentials (Munkres), row by row: O(rows^2 x columns). Rows without a column of their own are
    given one of zeros.
    """
    rows = len(scores)
    columns = (len(scores[0]) if rows else 0) + rows
    costs = [[-score for score in row] + [0.0] * rows for row in scores]
    row_of = [-1] * (columns + 1)  # which row holds a column; the last is the row being placed
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
    placed = [(row_of[column], column) for column in range(columns - rows) if row_of[column] != -1]
    return sum((scores[row][column] for row, column in placed), 0.0)


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
