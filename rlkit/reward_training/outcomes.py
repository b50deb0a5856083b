"""Responses with outcome labels, from the usual layouts of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal

from rlkit.data.base import BadRow, DataError, Problem
from rlkit.data.cells import Row, RowError, cell, conversation, prompt_of
from rlkit.data.cells import label as label_of
from rlkit.data.rows import held_out, question_key
from rlkit.experience import Message
from rlkit.reward_training.rows import DEFAULT_HELDOUT_SHARE, RewardDataConfig, Side, read

Layout = Literal["responses", "completions", "columns", "pairs", "steps"]
_USUAL: dict[Layout, tuple[str, str, str]] = {
    "responses": ("prompt", "response", "label"),
    "completions": ("prompt", "completions", "correctness"),
    "columns": ("question", "solution", "is_correct"),
    "pairs": ("prompt", "chosen", "rejected"),
    "steps": ("problem", "steps", "label"),
}
"""Usual columns of prompt, response and label."""


class OutcomeData(RewardDataConfig):
    layout: Literal["auto", "responses", "completions", "columns", "pairs", "steps"] = "auto"
    """responses: one response and its label per row. completions: per prompt a list of responses and a list of labels.
    columns: per row several columns, each an object with a response and its label. pairs: a better (label 1) and a
    worse response (label 0). steps: a list of steps and the number of the first wrong one (ProcessBench). auto: chosen
    by the first row."""
    prompt_column: str | None = None
    """The prompt: a text or chat messages. null: `prompt` (columns: `question`, steps: `problem`). A response that is a
    whole chat already includes its prompt."""
    response_column: str | None = None
    """The response (pairs: the better one). null: `response`, `completions`, `solution`, `chosen` or `steps`."""
    label_column: str | None = None
    """Label of the response: true, false or a number from 0 to 1 (pairs: the worse response; steps: the first wrong
    step from 0, -1 for none). null: `label`, `correctness`, `is_correct` or `rejected`."""
    group_column: str | None = None
    """Responses with equal values in this column answer the same problem; null: those with the same prompt."""
    system_prompt: str | None = None
    """System message added to every prompt that has none."""


@dataclass(frozen=True, slots=True)
class Rollout:
    group: str
    """The same for all responses to a problem."""
    messages: tuple[Message, ...]
    response: str
    label: float
    """0 (wrong) to 1 (right)."""
    origin: str
    steps: tuple[tuple[int, int], ...] = ()
    """Character range of each step, if the data give the steps."""
    first_error: int | None = None
    """First wrong step; -1: all are right; None: not known."""


def load_rollouts(config: OutcomeData, side: Side = "train") -> tuple[list[Rollout], list[BadRow]]:
    """Return a side's rollouts and unusable rows. Raise DataError if too many rows are unusable."""
    layout: Layout | None = None if config.layout == "auto" else config.layout

    def parse(row: Row, origin: str) -> Iterator[Rollout]:
        nonlocal layout
        layout = layout or _layout(row, config)  # the layout of the first readable row
        return _rollouts(row, origin, layout, config)

    rollouts, bad = read(config, parse, side)
    return (_without_repeats(rollouts) if layout == "pairs" else rollouts), bad


def split_rollouts(rollouts: Sequence[Rollout], config: OutcomeData) -> tuple[list[Rollout], list[Rollout]]:
    """Split off a share of the groups as held out, chosen by name. Raise DataError if there is only one group."""
    share = config.heldout_share or DEFAULT_HELDOUT_SHARE
    chosen = held_out((rollout.group for rollout in rollouts), share, config.heldout_seed)
    if chosen is None:
        raise DataError(
            f"{config.path} has responses to one problem only, so none can be held out: set data.heldout_path"
        )
    return list(compress(rollouts, ~chosen)), list(compress(rollouts, chosen))


def without(rollouts: Sequence[Rollout], heldout: Sequence[Rollout]) -> tuple[list[Rollout], list[BadRow]]:
    """Drop the rollouts of held-out groups; they become bad rows."""
    judged = {rollout.group: rollout.origin for rollout in heldout}
    kept = [rollout for rollout in rollouts if rollout.group not in judged]
    bad = [BadRow(r.origin, f"held out: {judged[r.group]} asks the same") for r in rollouts if r.group in judged]
    return kept, bad


def _layout(row: Row, config: OutcomeData) -> Layout:
    for layout in ("pairs", "completions", "steps", "responses"):
        _, response, label = _names(layout, config)
        if layout == "pairs" and label != "rejected":  # otherwise a label in words would be taken for a worse response
            continue
        if {response, label} <= row.keys() and _fits(layout, row[response], row[label]):
            return layout
    if _candidates(row, config):
        return "columns"
    usual = "; ".join(f"{layout}: {', '.join(names)}" for layout, names in _USUAL.items())
    raise DataError(
        f"data.path={config.path}: no layout fits its columns {', '.join(row)}. Name them with data.prompt_column, "
        f"data.response_column and data.label_column, and set data.layout. Usual names: {usual}"
    )


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

    def rollout(response: Any, label: float, where: str, **more: Any) -> Rollout:
        if isinstance(response, list):
            messages, text = conversation(response, where)
        else:
            messages, text = prompt_of(row, prompt_name), response
        if not isinstance(text, str):  # an empty text is a response too: the model ended at once
            raise RowError(f"{where} must be a text or a chat, not {type(text).__name__}")
        if config.system_prompt and messages[0].role != "system":
            messages = (Message("system", config.system_prompt), *messages)
        group = _group(cell(row, config.group_column)) if config.group_column else question_key(Problem("", messages))
        return Rollout(group, messages, text, label, f"{origin} {where}", **more)

    match layout:
        case "responses":
            yield rollout(cell(row, response_name), label_of(cell(row, label_name), label_name), response_name)
        case "pairs":
            yield rollout(cell(row, response_name), 1.0, response_name)
            yield rollout(cell(row, label_name), 0.0, label_name)
        case "completions":
            responses, labels = cell(row, response_name), cell(row, label_name)
            if not (isinstance(responses, list) and isinstance(labels, list) and len(responses) == len(labels)):
                raise RowError(f"{response_name} and {label_name} must be lists of equal length")
            for i, (response, label) in enumerate(zip(responses, labels, strict=True)):
                yield rollout(response, label_of(label, f"{label_name}[{i}]"), f"{response_name}[{i}]")
        case "columns":
            candidates = _candidates(row, config)
            if not candidates:
                raise RowError(f"no column is an object with {response_name} and {label_name}")
            for name in candidates:
                label = label_of(row[name][label_name], f"{name}.{label_name}")
                yield rollout(cell(row[name], response_name), label, name)
        case "steps":
            steps, error = cell(row, response_name), cell(row, label_name)
            if not (isinstance(steps, list) and steps and all(isinstance(s, str) and s.strip() for s in steps)):
                raise RowError(f"{response_name} must be a list of texts, none of them empty")
            if not isinstance(error, int) or isinstance(error, bool) or not -1 <= error < len(steps):
                raise RowError(f"{label_name} must be the number of a step, 0 to {len(steps) - 1}, or -1 for none")
            text, spans = _joined(steps)
            yield rollout(text, float(error == -1), response_name, steps=spans, first_error=error)


def _joined(steps: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Join steps by blank lines; return the text and each step's character range, including the blank line after it."""
    texts = [step + "\n\n" for step in steps[:-1]] + [steps[-1]]
    ends = [sum(len(text) for text in texts[: i + 1]) for i in range(len(texts))]
    return "".join(texts), tuple(zip([0, *ends[:-1]], ends, strict=True))


def _group(value: Any) -> str:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise RowError(f"the group must be a text or a whole number, not {value!r}")
    return str(value)


def _without_repeats(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Count a response that is in several pairs of a prompt only once, with its first label."""
    first: dict[tuple[str, str], Rollout] = {}
    for rollout in rollouts:
        first.setdefault((rollout.group, rollout.response), rollout)
    return list(first.values())
