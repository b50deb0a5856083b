"""Rows of `train_reward reward=polar`: prompts, what policies wrote to them, or finished triplets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rlkit.data.base import BadRow, DataError
from rlkit.data.files import json_lines
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.polar_training.triplets import Triplet
from rlkit.reward_training.base import RewardDataConfig

Form = Literal["prompts", "trajectories", "columns", "triplets"]
DEFAULT_HELDOUT_SHARE = 0.1


class PolarRows(RewardDataConfig):
    """Rows of `reward=polar`."""

    form: Form | None = None
    """prompts: what policies shall answer. trajectories: one response per row, as stage=generate writes them. columns:
    one prompt per row and a column per policy. triplets: prompt, reference, chosen and rejected, as the official code
    takes them. null: prompts for stage=generate, trajectories for stage=pretrain, otherwise triplets."""
    prompt_column: str = "prompt"
    """The prompt: a text, or a list of chat messages (their contents, one per line: POLAR reads no roles)."""
    reference_column: str | None = None
    """The gold response to the prompt (text or messages), for right against wrong; null: there is none. In triplets it
    is always `reference`."""
    response_column: str = "response"
    """trajectories: the response."""
    policy_column: str = "policy"
    """trajectories: who wrote it."""
    style_column: str | None = None
    """trajectories: how it is written; only policies of one style are told apart. null: all write alike."""
    label_column: str | None = None
    """trajectories: whether the response is right (true or false, may be null); null: not known."""
    policy_columns: dict[str, str] = Field(default={})
    """columns: column -> policy; two columns of one policy are two of its responses. Each holds a text, or an object
    with `response_key` and, where it is known whether the response is right, `label_key`."""
    response_key: str = "solution"
    """columns: where an object holds the text."""
    label_key: str = "is_correct"
    """columns: where an object holds the label."""

    @model_validator(mode="after")
    def _options_act(self) -> PolarRows:
        of = {
            "trajectories": ("response_column", "policy_column", "style_column", "label_column"),
            "columns": ("policy_columns", "response_key", "label_key"),
        }
        for form, names in of.items():
            for name in names:
                if self.form not in (form, None) and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"data.{name} has no effect with data.form={self.form}")
        if self.form == "columns" and not self.policy_columns:
            raise ValueError("data.form=columns needs data.policy_columns={COLUMN: POLICY, ...}")
        return self


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A response and who wrote it."""

    text: str
    policy: str
    style: str = ""
    correct: bool | None = None


@dataclass(slots=True)
class Asked:
    """A prompt with everything that was written to it."""

    prompt: str
    reference: str | None = None
    """The gold response."""
    trajectories: list[Trajectory] = field(default_factory=list)
    triplets: list[Triplet] = field(default_factory=list)


class _RowError(ValueError):
    """This row cannot be used; the message is the reason."""


def read(config: PolarRows, form: Form, key: str = "path") -> tuple[list[Asked], list[BadRow]]:
    """All prompts of the file that `data.<key>` names, and the unusable rows. Raises DataError if too many are."""
    path = Path(getattr(config, key)).expanduser()
    found: dict[str, Asked] = {}
    bad: list[BadRow] = []
    rows = list(json_lines(path, f"data.{key}"))
    for origin, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            _take(row, config, form, found)
        except _RowError as error:
            bad.append(BadRow(origin, str(error)))
    refuse_too_many_bad_rows(bad, len(rows), config.max_bad_row_share, f"data.{key}={path}")
    return list(found.values()), bad


def read_split(config: PolarRows, form: Form) -> tuple[list[Asked], list[Asked], list[BadRow]]:
    """Training and held-out prompts, and the unusable rows. Raises DataError."""
    train, bad = read(config, form)
    if config.heldout_path is None:
        train, heldout = split(train, config.heldout_share or DEFAULT_HELDOUT_SHARE, config.heldout_seed)
    else:
        heldout, more = read(config, form, "heldout_path")
        bad += more
    for name, asked in (("training", train), ("held-out", heldout)):
        if not asked:
            raise DataError(f"data.path={config.path}: no {name} prompt is left; give more, or another heldout_share")
    return train, heldout, bad


def split(asked: Sequence[Asked], share: float, seed: int) -> tuple[list[Asked], list[Asked]]:
    """By a hash of the prompt, so that other rows do not move a prompt from one side to the other."""
    sides: tuple[list[Asked], list[Asked]] = ([], [])
    for each in asked:
        digest = hashlib.sha256(f"{seed} {each.prompt}".encode()).digest()
        sides[int.from_bytes(digest[:8]) < share * 2**64].append(each)
    return sides


def _take(row: Mapping[str, Any], config: PolarRows, form: Form, found: dict[str, Asked]) -> None:
    """Put what a row holds to its prompt; a row is used whole or not at all."""
    prompt = _text(row, config.prompt_column)
    if form == "triplets":
        reference, chosen, rejected = (_text(row, name) for name in ("reference", "chosen", "rejected"))
        if chosen == rejected:
            raise _RowError("chosen and rejected are equal")
        found.setdefault(prompt, Asked(prompt)).triplets.append(Triplet(prompt, reference, chosen, rejected))
        return
    gold = None if config.reference_column is None else _text(row, config.reference_column)
    new = list(_trajectories(row, config, form))
    asked = found.setdefault(prompt, Asked(prompt, gold))
    asked.trajectories += new


def _trajectories(row: Mapping[str, Any], config: PolarRows, form: Form) -> Iterator[Trajectory]:
    if form == "trajectories":
        style = "" if config.style_column is None else str(_cell(row, config.style_column))
        label = None if config.label_column is None else _label(row.get(config.label_column), config.label_column)
        yield Trajectory(_text(row, config.response_column), str(_cell(row, config.policy_column)), style, label)
    elif form == "columns":
        for column, policy in config.policy_columns.items():
            cell = _cell(row, column)
            inside = cell if isinstance(cell, Mapping) else {config.response_key: cell}
            label = _label(inside.get(config.label_key), config.label_key)
            yield Trajectory(_text(inside, config.response_key), policy, "", label)


def _label(value: Any, name: str) -> bool | None:
    if value is not None and value not in (0, 1):
        raise _RowError(f"{name} must be true or false, not {value!r}")
    return None if value is None else bool(value)


def _text(row: Mapping[str, Any], column: str) -> str:
    """Messages become their contents, one per line."""
    value = _cell(row, column)
    if isinstance(value, list) and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in value):
        return "\n".join(message["content"] for message in value)
    if not isinstance(value, str):
        raise _RowError(f"{column} must be a text or a list of messages, not {type(value).__name__}")
    return value


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise _RowError(f"{column} is null" if column in row else f"no column {column!r} (it has {', '.join(row)})")
    return row[column]
