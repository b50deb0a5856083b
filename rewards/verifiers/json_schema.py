"""`reward=json_schema`: 1 if the response is JSON that matches its schema, else 0."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import model_validator

from rewards.base import RewardTraits
from rewards.verifiers.pool import CannotJudgeError, TextRule, TextRuleConfig, column_value, excerpt
from rlkit.experience import Prompt, Score

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_FENCE_LANGUAGES = ("", "json", "json5", "jsonc")


class JsonSchema(TextRule):
    """Reads the whole response as JSON, or else its last fenced block, and checks it against a schema.

    References are never resolved over the network. A response scores 0 if it is nested too deeply to be read, or if a
    pattern of the schema runs past the deadline on it.
    """

    class Config(TextRuleConfig):
        schema_column: str = "json_schema"
        """Column with a prompt's JSON schema (an object or its text); not used with a `schema_file`."""
        schema_file: Path | None = None
        """File with one JSON schema for all prompts, instead of the column."""

        @model_validator(mode="after")
        def _one_source(self) -> JsonSchema.Config:
            if self.schema_file is not None and self.schema_column != "json_schema":
                raise ValueError("reward.schema_column has no effect with reward.schema_file: set one of them")
            return self

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        columns = () if config.schema_file is not None else (config.schema_column,)
        return RewardTraits(columns=columns, uses_gpu=False)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        messages = super().check(config)
        if config.schema_file is not None:
            try:
                _schema_of_file(config.schema_file)
            except CannotJudgeError as error:
                messages.append(f"reward.schema_file={config.schema_file}: {error}")
        return messages

    def task(self, prompt: Prompt) -> str:
        if self.config.schema_file is not None:
            return self._schema_for_all
        schema = column_value(prompt, self.config.schema_column)
        if not isinstance(schema, (Mapping, bool)):
            raise CannotJudgeError(f"bad_schema: column {self.config.schema_column!r} holds no JSON schema")
        try:
            return json.dumps(schema, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise CannotJudgeError(f"bad_schema: column {self.config.schema_column!r}: {error}") from error

    @functools.cached_property
    def _schema_for_all(self) -> str:
        return json.dumps(_schema_of_file(self.config.schema_file))

    @staticmethod
    def judge(config: Any, task: str, text: str, /) -> Score:
        validator = _validator(task)
        value = read_json(text)
        if value is None:
            return Score(0.0, components={"json": 0.0, "valid": 0.0}, trace=f"no JSON in {excerpt(text)}")
        from referencing.exceptions import Unresolvable

        try:
            fault = next(validator.iter_errors(value[0]), None)
        except Unresolvable as error:  # the schema's fault, not the response's
            raise CannotJudgeError(f"bad_schema: a reference cannot be resolved: {str(error)[:200]}") from error
        if fault is None:
            return Score(1.0, components={"json": 1.0, "valid": 1.0}, trace="allowed by the schema")
        trace = f"at {fault.json_path}: {fault.message[:300]}"
        return Score(0.0, components={"json": 1.0, "valid": 0.0}, trace=trace)


def read_json(text: str) -> tuple[Any] | None:
    """Return the JSON value of the text or of its last fenced block; in a tuple, because it may be None.

    NaN, Infinity and repeated names are not JSON. Raise RecursionError for deep nesting.
    """
    for candidate in (text, last_fenced_block(text)):
        if candidate is not None and candidate.strip():
            try:
                return (json.loads(candidate, parse_constant=_refuse, object_pairs_hook=_object),)
            except ValueError:
                continue
    return None


def last_fenced_block(text: str) -> str | None:
    """Return the content of the last closed ``` block that is marked as JSON or not marked."""
    fences = list(_FENCE.finditer(text))
    blocks = []
    opened: re.Match[str] | None = None
    for fence in fences:
        if opened is None:
            opened = fence
        elif fence[1] == "":
            if opened[1].lower() in _FENCE_LANGUAGES:
                blocks.append(text[opened.end() : fence.start()])
            opened = None
    return blocks[-1] if blocks else None


@functools.lru_cache(maxsize=256)
def _validator(schema_text: str) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from jsonschema_specifications import REGISTRY

    schema = json.loads(schema_text)
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise CannotJudgeError(f"bad_schema: not a JSON schema: {error.message[:200]}") from error
    return kind(schema, registry=REGISTRY)  # without a registry, it would fetch remote references


def _schema_of_file(path: Path) -> Any:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotJudgeError(f"no_schema: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CannotJudgeError(f"bad_schema: not JSON: {error}") from error
    _validator(json.dumps(schema))
    return schema


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has a duplicate name")
    return members


def _plain(value: Any) -> Any:
    """Convert to plain JSON types; raise TypeError for any other type."""
    return value.tolist() if hasattr(value, "tolist") else dict(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
