"""Responses with outcome labels from JSON Lines, in the layouts that such data come in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlkit.data.base import BadRow, DataError
from rlkit.data.files import json_lines
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.experience import Message
from rlkit.reward_training.base import RewardDataConfig

Layout = Literal["responses", "completions", "columns", "pairs", "steps"]
_USUAL: dict[Layout, tuple[str, str, str]] = {
    "responses": ("prompt", "response", "label"),
    "completions": ("prompt", "completions", "correctness"),
    "columns": ("question", "solution", "is_correct"),
    "pairs": ("prompt", "chosen", "rejected"),
    "steps": ("problem", "steps", "label"),
}
"""Usual names of the columns with prompt, response and label."""
_DEFAULT_HELDOUT_SHARE = 0.1


class OutcomeData(RewardDataConfig):
    """Responses to prompts, each with its outcome."""

    layout: Literal["auto", "responses", "completions", "columns", "pairs", "steps"] = "auto"
    """responses: one response and its label per row. completions: per prompt a list of responses and a list of labels.
    columns: per prompt several columns, each an object with a response and its label. pairs: a better (label 1) and a
    worse response (label 0). steps: a list of steps and the number of the first wrong one (ProcessBench). auto: from
    the first row."""
    prompt_column: str | None = None
    """The prompt: a text or chat messages. null: `prompt` (columns: `question`, steps: `problem`). A response that is a
    whole chat brings its own."""
    response_column: str | None = None
    """The response (pairs: the better one). null: `response`, `completions`, `solution`, `chosen` or `steps`."""
    label_column: str | None = None
    """Its outcome, true or false or a share from 0 to 1 (pairs: the worse response; steps: the first wrong step from 0,
    -1 for none). null: `label`, `correctness`, `is_correct` or `rejected`."""
    group_column: str | None = None
    """Responses with equal values answer the same problem; null: those with the same prompt."""
    system_prompt: str | None = None
    """System message put before every prompt that has none of its own."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response and its outcome."""

    group: str
    """Equal for responses to the same problem."""
    messages: tuple[Message, ...]
    response: str
    label: float
    """0 (wrong) to 1 (right)."""
    origin: str
    steps: tuple[tuple[int, int], ...] = ()
    """Characters of each step, where the data say so."""
    first_error: int | None = None
    """First wrong step, -1 if there is none, None if the data do not say."""


class _RowError(ValueError):
    """This row cannot be used; the message is the reason."""


def load_rollouts(config: OutcomeData, key: str = "path") -> tuple[list[Rollout], list[BadRow]]:
    """All rollouts of the file that `data.<key>` names, and the unusable rows. Raises DataError if too many are."""
    path = Path(getattr(config, key)).expanduser()
    rows = list(json_lines(path, f"data.{key}"))
    layout = config.layout if config.layout != "auto" else _layout(rows, config, path)
    found: list[Rollout] = []
    bad: list[BadRow] = []
    for origin, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            found += list(_rollouts(row, origin, layout, config))  # the whole row, or nothing of it
        except _RowError as error:
            bad.append(BadRow(origin, str(error)))
    refuse_too_many_bad_rows(bad, len(rows), config.max_bad_row_share, str(path))
    return (_without_repeats(found) if layout == "pairs" else found), bad


def split_rollouts(rollouts: Sequence[Rollout], config: OutcomeData) -> tuple[list[Rollout], list[Rollout]]:
    """(train, held out): a share of the groups, chosen by their name. Raises DataError for a single group."""
    groups = {rollout.group for rollout in rollouts}
    if len(groups) < 2:
        raise DataError(
            f"{config.path} has responses to one problem only, so none can be held out: set data.heldout_path"
        )
    share = _DEFAULT_HELDOUT_SHARE if config.heldout_share is None else config.heldout_share
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    ranked = sorted(groups, key=lambda group: hashlib.sha256(f"{config.heldout_seed}\n{group}".encode()).digest())
    chosen = set(ranked[:count])
    return [r for r in rollouts if r.group not in chosen], [r for r in rollouts if r.group in chosen]


def without(rollouts: Sequence[Rollout], heldout: Sequence[Rollout]) -> tuple[list[Rollout], list[BadRow]]:
    """Rollouts of no group that is held out, and what was left out for that."""
    judged = {rollout.group: rollout.origin for rollout in heldout}
    kept = [rollout for rollout in rollouts if rollout.group not in judged]
    bad = [BadRow(r.origin, f"held out: {judged[r.group]} asks the same") for r in rollouts if r.group in judged]
    return kept, bad


def _layout(rows: Sequence[tuple[str, Any]], config: OutcomeData, path: Path) -> Layout:
    """What the first readable row looks like."""
    for _, row in rows:
        if isinstance(row, BadRow):
            continue
        for layout in ("pairs", "completions", "steps", "responses"):
            _, response, label = _names(layout, config)
            if {response, label} <= row.keys() and _fits(layout, row[response], row[label]):
                return layout
        if _candidates(row, config):
            return "columns"
        usual = "; ".join(f"{layout}: {', '.join(names)}" for layout, names in _USUAL.items())
        raise DataError(
            f"data.path={path}: no layout fits its columns {', '.join(row)}. Name them with data.prompt_column, "
            f"data.response_column and data.label_column, and set data.layout. Usual names: {usual}"
        )
    raise DataError(f"data.path={path} has no line that is a JSON object")


def _fits(layout: Layout, response: Any, label: Any) -> bool:
    match layout:
        case "completions":
            return isinstance(response, list) and isinstance(label, list)
        case "steps":
            return isinstance(response, list) and isinstance(label, int)
        case "pairs":
            return isinstance(label, (str, list))
        case _:
            return isinstance(label, (bool, int, float))


def _names(layout: Layout, config: OutcomeData) -> tuple[str, str, str]:
    prompt, response, label = _USUAL[layout]
    return config.prompt_column or prompt, config.response_column or response, config.label_column or label


def _candidates(row: Mapping[str, Any], config: OutcomeData) -> list[str]:
    _, response, label = _names("columns", config)
    return [name for name, value in row.items() if isinstance(value, dict) and {response, label} <= value.keys()]


def _rollouts(row: Mapping[str, Any], origin: str, layout: Layout, config: OutcomeData) -> Iterator[Rollout]:
    prompt_name, response_name, label_name = _names(layout, config)

    def cell(name: str) -> Any:
        if row.get(name) is None:
            raise _RowError(f"{name} is null" if name in row else f"no column {name!r} (it has {', '.join(row)})")
        return row[name]

    def rollout(response: Any, label: float, where: str, **more: Any) -> Rollout:
        if isinstance(response, list):
            messages, text = _chat(response, where)
        else:
            messages, text = _prompt(cell(prompt_name), prompt_name), response
        if not isinstance(text, str):  # an empty one is a response, too: the model ended at once
            raise _RowError(f"{where} must be a text or a chat, not {type(text).__name__}")
        if config.system_prompt and messages[0].role != "system":
            messages = (Message("system", config.system_prompt), *messages)
        group = _group(cell(config.group_column)) if config.group_column else _key(messages)
        return Rollout(group, messages, text, label, f"{origin} {where}", **more)

    match layout:
        case "responses":
            yield rollout(cell(response_name), _label(cell(label_name), label_name), response_name)
        case "pairs":
            yield rollout(cell(response_name), 1.0, response_name)
            yield rollout(cell(label_name), 0.0, label_name)
        case "completions":
            responses, labels = cell(response_name), cell(label_name)
            if not (isinstance(responses, list) and isinstance(labels, list) and len(responses) == len(labels)):
                raise _RowError(f"{response_name} and {label_name} must be lists of equal length")
            for i, (response, label) in enumerate(zip(responses, labels, strict=True)):
                yield rollout(response, _label(label, f"{label_name}[{i}]"), f"{response_name}[{i}]")
        case "columns":
            candidates = _candidates(row, config)
            if not candidates:
                raise _RowError(f"no column is an object with {response_name} and {label_name}")
            for name in candidates:
                yield rollout(row[name][response_name], _label(row[name][label_name], f"{name}.{label_name}"), name)
        case "steps":
            steps, error = cell(response_name), cell(label_name)
            if not (isinstance(steps, list) and steps and all(isinstance(s, str) and s.strip() for s in steps)):
                raise _RowError(f"{response_name} must be a list of texts, none of them empty")
            if not isinstance(error, int) or isinstance(error, bool) or not -1 <= error < len(steps):
                raise _RowError(f"{label_name} must be the number of a step, 0 to {len(steps) - 1}, or -1 for none")
            text, spans = _joined(steps)
            yield rollout(text, float(error == -1), response_name, steps=spans, first_error=error)


def _joined(steps: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Steps with a blank line after each but the last, and the characters of each with that line."""
    texts = [step + "\n\n" for step in steps[:-1]] + [steps[-1]]
    ends = [sum(len(text) for text in texts[: i + 1]) for i in range(len(texts))]
    return "".join(texts), tuple(zip([0, *ends[:-1]], ends, strict=True))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{what} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise _RowError(f"{what} is empty")
    return value


def _label(value: Any, what: str) -> float:
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
        raise _RowError(f"{what} must be true, false or a number from 0 to 1, not {value!r}")
    return float(value)


def _prompt(value: Any, what: str) -> tuple[Message, ...]:
    if isinstance(value, list):
        return _messages(value, what)
    return (Message("user", _text(value, what)),)


def _chat(value: list[Any], what: str) -> tuple[tuple[Message, ...], str]:
    """A chat whose last turn is the response."""
    messages = _messages(value, what)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise _RowError(f"{what} is a chat, so it must have a prompt and end with the assistant's message")
    return messages[:-1], messages[-1].content


def _messages(value: list[Any], what: str) -> tuple[Message, ...]:
    if not value or not all(isinstance(item, Mapping) and {"role", "content"} <= item.keys() for item in value):
        raise _RowError(f"{what} must be a list of chat messages with role and content")
    return tuple(Message(_text(m["role"], f"{what}.role"), _text(m["content"], f"{what}.content")) for m in value)


def _group(value: Any) -> str:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise _RowError(f"the group must be a text or a whole number, not {value!r}")
    return str(value)


def _key(messages: Sequence[Message]) -> str:
    """Equal for prompts that ask the same: white space and case aside, without the system message."""
    return "\n".join(" ".join(m.content.split()).casefold() for m in messages if m.role != "system")


def _without_repeats(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """A response that stands in several pairs of a prompt counts once, with its first label."""
    first: dict[tuple[str, str], Rollout] = {}
    for rollout in rollouts:
        first.setdefault((rollout.group, rollout.response), rollout)
    return list(first.values())
