"""Preference pairs from rows: taken as they are, or built from responses with labels."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlkit.data.base import BadRow, DataError
from rlkit.data.cells import Chat, Row, RowError, cell, chat, number, prompt_of
from rlkit.reward_training.rows import RewardDataConfig, Side, read, read_split


class PairRows(RewardDataConfig):
    form: Literal["pairs", "outcomes"] = "pairs"
    """pairs: each row has a chosen and a rejected response; outcomes: rows have responses with labels, and every
    response is paired with each response to the same prompt that has a lower label."""
    prompt_column: str | None = "prompt"
    """The prompt: a text or a list of chat messages. null (pairs only): chosen and rejected are whole conversations
    that begin alike."""
    chosen_column: str = "chosen"
    """pairs: the preferred response: a text, or a list of chat messages."""
    rejected_column: str = "rejected"
    """pairs: the other response."""
    margin_column: str | None = None
    """pairs: by how much chosen should score above rejected (a number)."""
    probability_column: str | None = None
    """pairs: the probability that chosen is preferred (a soft label from 0 to 1); null: 1."""
    response_columns: tuple[str, ...] = ("response",)
    """outcomes: columns with one response each: a text, or an object with `response_key` and `label_key`."""
    response_key: str = "solution"
    """outcomes: key of the text in such an object."""
    label_key: str = "is_correct"
    """outcomes: key of the label (true, false or a number) in such an object; for a text, the row's column."""
    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """outcomes: use at most this many of a prompt's pairs, drawn at random; null: all."""

    @field_validator("response_columns", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_act(self) -> PairRows:
        of_pairs = ("chosen_column", "rejected_column", "margin_column", "probability_column")
        of_outcomes = ("response_columns", "response_key", "label_key", "max_pairs_per_prompt")
        for name in of_pairs if self.form == "outcomes" else of_outcomes:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"data.{name} has no effect with data.form={self.form}")
        if self.form == "outcomes" and self.prompt_column is None:
            raise ValueError("data.prompt_column is needed with data.form=outcomes")
        return self


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: Chat
    chosen: str
    rejected: str
    margin: float = 0.0
    probability: float = 1.0
    """Probability that chosen is preferred."""
    origin: str = ""


Labelled = tuple[float, str, str]
"""Label, response, origin."""


def load_pairs(config: PairRows, seed: int) -> tuple[list[list[Pair]], list[list[Pair]], list[BadRow]]:
    """Return training and held-out pairs, grouped by prompt, and the unusable rows.

    Raise DataError if too many rows are unusable or a side is empty.
    """
    return read_split(config, lambda side: all_pairs(config, seed, side), lambda pairs: _key(pairs[0].prompt), "pair")


def all_pairs(config: PairRows, seed: int, side: Side = "train") -> tuple[list[list[Pair]], list[BadRow]]:
    if config.form == "pairs":
        pairs, bad = read(config, lambda row, origin: [_pair(row, config, origin)], side)
        return list(_by_prompt((pair.prompt, pair) for pair in pairs).values()), bad
    responses, bad = read(config, lambda row, origin: _responses(row, config, origin), side)
    built = [_by_label(prompt, labelled, config, seed) for prompt, labelled in _by_prompt(responses).items()]
    if not any(built):
        raise DataError(f"data.path={config.path}: no prompt has responses with different labels: no pair can be built")
    return [pairs for pairs in built if pairs], bad


def _by_prompt(items: Any) -> dict[Chat, list[Any]]:
    groups: dict[Chat, list[Any]] = {}
    for prompt, item in items:
        groups.setdefault(prompt, []).append(item)
    return groups


def _responses(row: Row, config: PairRows, origin: str) -> Iterator[tuple[Chat, Labelled]]:
    prompt = prompt_of(row, str(config.prompt_column))
    for column in config.response_columns:
        value = cell(row, column)
        inside = value if isinstance(value, Mapping) else {**row, config.response_key: value}
        text = _response(cell(inside, config.response_key), column)
        yield prompt, (number(inside, config.label_key), text, f"{origin} {column}")


def _by_label(prompt: Chat, responses: Sequence[Labelled], config: PairRows, seed: int) -> list[Pair]:
    different = list({(label, text): (label, text, origin) for label, text, origin in responses}.values())
    pairs = [
        Pair(prompt, better, worse, origin=origin)
        for high, better, origin in different
        for low, worse, _ in different
        if high > low and better != worse
    ]
    if config.max_pairs_per_prompt is not None and len(pairs) > config.max_pairs_per_prompt:
        pairs = random.Random(f"{seed} {_key(prompt)}").sample(pairs, config.max_pairs_per_prompt)
    return pairs


def _pair(row: Row, config: PairRows, origin: str) -> Pair:
    names = (config.chosen_column, config.rejected_column)
    values = [cell(row, name) for name in names]
    if config.prompt_column is None:
        prompt, chosen, rejected = _conversations(*values)
    else:
        prompt = prompt_of(row, config.prompt_column)
        chosen, rejected = (_response(value, name) for value, name in zip(values, names, strict=True))
    if chosen == rejected:
        raise RowError("chosen and rejected are equal")
    margin = 0.0 if config.margin_column is None else number(row, config.margin_column)
    probability = 1.0 if config.probability_column is None else number(row, config.probability_column)
    if not 0 <= probability <= 1:
        raise RowError(f"{config.probability_column} is {probability}, not between 0 and 1")
    return Pair(prompt, chosen, rejected, margin, probability, origin)


def _conversations(chosen: Any, rejected: Any) -> tuple[Chat, str, str]:
    first, second = chat(chosen, "chosen"), chat(rejected, "rejected")
    if first[:-1] != second[:-1] or len(first) < 2 or {first[-1].role, second[-1].role} != {"assistant"}:
        raise RowError("chosen and rejected must be conversations that differ in the last message only")
    return first[:-1], first[-1].content, second[-1].content


def _response(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    messages = chat(value, what)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise RowError(
            f"{what} must be a text or one assistant message; for whole conversations set data.prompt_column=null"
        )
    return messages[0].content


def _key(prompt: Chat) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)
