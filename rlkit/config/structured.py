"""The pattern that responses must match (`rollout.structured`), read and checked before anything starts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from rlkit.data.base import BadRow, Problem
from rlkit.data.stored import picked
from rlkit.experience.section import Section

COLUMN = "column:"
"""Prefix of the name of a data column that holds each problem's own value."""


class StructuredConfig(Section):
    """What every response must match: a regex, choices or a JSON schema. Tokens that do not fit are never sampled
    (constrained decoding). The value `column:NAME` takes each problem's own value from that column of the data."""

    regex: str | None = None
    """A regular expression for the whole response."""
    choices: tuple[str, ...] | str | None = None
    """Texts; the whole response must be one of them."""
    json_schema: dict[str, Any] | str | None = None
    """A JSON schema, or the path of a file that contains one."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(value is not None for value in (self.regex, self.choices, self.json_schema)) != 1:
            raise ValueError("set one of regex, choices and json_schema")
        if isinstance(self.choices, str) and not self.choices.startswith(COLUMN):
            raise ValueError(f"choices must be a list of texts, like [yes,no], or {COLUMN}NAME")
        return self

    @property
    def kind(self) -> Literal["regex", "choices", "json_schema"]:
        return "regex" if self.regex is not None else "choices" if self.choices is not None else "json_schema"

    @property
    def column(self) -> str | None:
        """Return the column with each problem's own value, if there is one."""
        value = getattr(self, self.kind)
        return value.removeprefix(COLUMN) if isinstance(value, str) and value.startswith(COLUMN) else None


Grammar = Mapping[str, Any]
"""One of vLLM's constraints with its value: `regex`, `choice` or `json` (a schema's text)."""


def grammar(config: StructuredConfig, columns: Mapping[str, Any]) -> Grammar:
    """Return the grammar. `columns`: the problem's, where its own value may be. Raises ValueError for a bad value."""
    if config.column is not None and columns.get(config.column) is None:
        raise ValueError(f"column {config.column!r} is empty")
    value = getattr(config, config.kind) if config.column is None else columns[config.column]
    if config.kind == "regex":
        return {"regex": _regex(value)}
    if config.kind == "choices":
        return {"choice": _choices(value)}
    if config.column is None and isinstance(value, str):
        value = _read(Path(value).expanduser())
    return {"json": json.dumps(_schema(value))}


def _regex(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a regular expression")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from error
    return value


def _choices(value: Any) -> list[str]:
    texts = _decoded(value)
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        raise ValueError(f"{value!r} is not a list of texts")
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{value!r} must be a list of texts, none of them empty")
    return list(texts)


def _schema(value: Any) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    schema = _decoded(value)
    if not isinstance(schema, Mapping):
        raise ValueError(f"{value!r} is not a JSON schema, which must be an object")
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"is not a JSON schema: {error.message[:200]}") from error
    return schema


def _decoded(value: Any) -> Any:
    """Decode JSON text, as in CSV files, and convert an array from Parquet to a list."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{value[:80]!r} is not JSON: {error}") from error


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def split_unusable(
    config: StructuredConfig | None, problems: Sequence[Problem]
) -> tuple[Sequence[Problem], list[BadRow]]:
    """Return the problems whose own value is usable, and the rows of the others."""
    if config is None or config.column is None:
        return problems, []
    good, bad = [], []
    for i, problem in enumerate(problems):
        try:
            grammar(config, problem.columns)
            good.append(i)
        except ValueError as error:
            bad.append(BadRow(problem.origin, f"rollout.structured.{config.kind}: {error}"))
    return picked(problems, good), bad
