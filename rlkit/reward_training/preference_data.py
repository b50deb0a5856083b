"""Preference pairs from rows: chosen and rejected as they stand, or built from responses with outcome labels."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlkit.data.base import BadRow, DataError
from rlkit.data.files import json_lines
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.experience import Message
from rlkit.reward_training.base import RewardDataConfig

DEFAULT_HELDOUT_SHARE = 0.1
Chat = tuple[Message, ...]


class PairRows(RewardDataConfig):
    """Rows of `reward=preference`."""

    form: Literal["pairs", "outcomes"] = "pairs"
    """pairs: each row has a chosen and a rejected response; outcomes: rows have responses with labels, and every
    response is paired with every one of a lower label to the same prompt."""
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
    """pairs: with which probability chosen is preferred (0 to 1: a soft label); null: 1."""
    response_columns: tuple[str, ...] = ("response",)
    """outcomes: columns with a response each: a text, or an object that holds `response_key` and `label_key`."""
    response_key: str = "solution"
    """outcomes: where an object of `response_columns` holds the text."""
    label_key: str = "is_correct"
    """outcomes: where such an object holds the label (true, false or a number); for a text: the row's column."""
    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """outcomes: of more pairs so many are drawn; null: all."""

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
    """Two responses to one conversation."""

    prompt: Chat
    chosen: str
    rejected: str
    margin: float = 0.0
    probability: float = 1.0
    """That chosen is preferred."""
    origin: str = ""


class _RowError(ValueError):
    """This row cannot be used; the message is the reason."""


def load_pairs(config: PairRows, seed: int) -> tuple[list[list[Pair]], list[list[Pair]], list[BadRow]]:
    """Training and held-out pairs, those of one prompt together, and the rows that cannot be used.

    Raises DataError if too many rows are unusable or a split is empty.
    """
    train, bad = _read(config, "path", config.path, seed)
    if config.heldout_path is not None:
        heldout, more = _read(config, "heldout_path", config.heldout_path, seed)
        bad += more
    else:
        train, heldout = _split(train, config.heldout_share or DEFAULT_HELDOUT_SHARE, config.heldout_seed)
    for name, prompts in (("training", train), ("held-out", heldout)):
        if not prompts:
            raise DataError(f"data.path={config.path}: no {name} pair is left; give more rows or another heldout_share")
    return train, heldout, bad


def all_pairs(config: PairRows, seed: int) -> tuple[list[list[Pair]], list[BadRow]]:
    """Every pair of `data.path`, for evaluation."""
    return _read(config, "path", config.path, seed)


def _read(config: PairRows, key: str, name: str, seed: int) -> tuple[list[list[Pair]], list[BadRow]]:
    rows = list(json_lines(Path(name).expanduser(), f"data.{key}"))
    bad: list[BadRow] = []
    found: dict[Chat, list[Any]] = {}
    for origin, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            for prompt, item in _items(row, config, origin):
                found.setdefault(prompt, []).append(item)
        except _RowError as error:
            bad.append(BadRow(origin, str(error)))
    refuse_too_many_bad_rows(bad, len(rows), config.max_bad_row_share, f"data.{key}={name}")
    if config.form == "pairs":
        return list(found.values()), bad
    built = [_by_outcome(prompt, items, config, seed) for prompt, items in found.items()]
    if not any(built):
        raise DataError(f"data.{key}={name}: no prompt has responses with different labels: no pair can be built")
    return [pairs for pairs in built if pairs], bad


def _items(row: Mapping[str, Any], config: PairRows, origin: str) -> Iterator[tuple[Chat, Any]]:
    """(prompt, Pair) of a row with a pair; (prompt, (label, response, origin)) for each of its responses."""
    if config.form == "pairs":
        pair = _pair(row, config, origin)
        yield pair.prompt, pair
        return
    prompt = _prompt(_cell(row, str(config.prompt_column)), str(config.prompt_column))
    responses = []
    for column in config.response_columns:
        cell = _cell(row, column)
        inside = cell if isinstance(cell, Mapping) else {config.response_key: cell, **row}
        text = _response(_cell(inside, config.response_key), column)
        responses.append((_number(inside, config.label_key), text, f"{origin} {column}"))
    for response in responses:  # a row is used whole or not at all
        yield prompt, response


def _by_outcome(prompt: Chat, items: Sequence[tuple[float, str, str]], config: PairRows, seed: int) -> list[Pair]:
    different = list({(label, text): (label, text, origin) for label, text, origin in items}.values())
    pairs = [
        Pair(prompt, better, worse, origin=origin)
        for high, better, origin in different
        for low, worse, _ in different
        if high > low and better != worse
    ]
    if config.max_pairs_per_prompt is not None and len(pairs) > config.max_pairs_per_prompt:
        pairs = random.Random(f"{seed} {_key(prompt)}").sample(pairs, config.max_pairs_per_prompt)
    return pairs


def _pair(row: Mapping[str, Any], config: PairRows, origin: str) -> Pair:
    names = (config.chosen_column, config.rejected_column)
    cells = [_cell(row, name) for name in names]
    if config.prompt_column is None:
        prompt, chosen, rejected = _conversations(*cells)
    else:
        prompt = _prompt(_cell(row, config.prompt_column), config.prompt_column)
        chosen, rejected = (_response(cell, name) for cell, name in zip(cells, names, strict=True))
    if chosen == rejected:
        raise _RowError("chosen and rejected are equal")
    margin = 0.0 if config.margin_column is None else _number(row, config.margin_column)
    probability = 1.0 if config.probability_column is None else _number(row, config.probability_column)
    if not 0 <= probability <= 1:
        raise _RowError(f"{config.probability_column} is {probability}, not between 0 and 1")
    return Pair(prompt, chosen, rejected, margin, probability, origin)


def _conversations(chosen: Any, rejected: Any) -> tuple[Chat, str, str]:
    first, second = _chat(chosen, "chosen"), _chat(rejected, "rejected")
    if first[:-1] != second[:-1] or len(first) < 2 or {first[-1].role, second[-1].role} != {"assistant"}:
        raise _RowError("chosen and rejected must be conversations that differ in the last message only")
    return first[:-1], first[-1].content, second[-1].content


def _prompt(value: Any, what: str) -> Chat:
    if isinstance(value, str):
        if not value.strip():
            raise _RowError(f"{what} is empty")
        return (Message("user", value),)
    return _chat(value, what)


def _response(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    chat = _chat(value, what)
    if len(chat) != 1 or chat[0].role != "assistant":
        raise _RowError(
            f"{what} must be a text or one assistant message; for whole conversations set data.prompt_column=null"
        )
    return chat[0].content


def _chat(value: Any, what: str) -> Chat:
    if not isinstance(value, list) or not value:
        raise _RowError(f"{what} must be a list of chat messages, not {type(value).__name__}")
    found = []
    for i, item in enumerate(value):
        parts = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if not all(isinstance(part, str) for part in parts):
            raise _RowError(f"{what}[{i}] must have a role and a content that are texts")
        found.append(Message(str(parts[0]), str(parts[1])))
    return tuple(found)


def _number(row: Mapping[str, Any], column: str) -> float:
    value = _cell(row, column)
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise _RowError(f"{column} must be a finite number, not {value!r}")
    return float(value)


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise _RowError(f"{column} is null" if column in row else f"no column {column!r} (it has {', '.join(row)})")
    return row[column]


def _split(prompts: Sequence[list[Pair]], share: float, seed: int) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """By a hash of the prompt, so that other rows in the file do not move a prompt from one side to the other."""
    train: list[list[Pair]] = []
    heldout: list[list[Pair]] = []
    for pairs in prompts:
        digest = hashlib.sha256(f"{seed} {_key(pairs[0].prompt)}".encode()).digest()
        (heldout if int.from_bytes(digest[:8]) < share * 2**64 else train).append(pairs)
    return train, heldout


def _key(prompt: Chat) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)
