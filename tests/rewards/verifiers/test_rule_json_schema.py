"""JSON in responses, and schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rewards.base import RewardContext
from rewards.verifiers.json_schema import JsonSchema, last_fenced_block, read_json
from rewards.verifiers.pool import CannotJudgeError
from rlkit.experience import Message, Prompt, Score

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


def judge(text: str, schema: Any = SCHEMA, **options: Any) -> Score:
    config = JsonSchema.Config(**options)
    prompt = Prompt("p", (Message("user", "?"),), (1,), columns={"json_schema": schema})
    return JsonSchema.judge(config, JsonSchema(config, RewardContext()).task(prompt), text)


@pytest.mark.parametrize(
    ("text", "json_found", "value"),
    [
        ('{"name": "Ann", "age": 3}', 1.0, 1.0),
        (' {"name": "Ann"}\n', 1.0, 1.0),
        ('Here you are:\n```json\n{"name": "Ann"}\n```\nDone.', 1.0, 1.0),
        ('```\n{"name": "Ann"}\n```', 1.0, 1.0),
        ('```json\n{"name": 3}\n```\nor\n```json\n{"name": "Ann"}\n```', 1.0, 1.0),
        ('```json\n{"name": "Ann"}\n```\nor\n```json\n{"name": 3}\n```', 1.0, 0.0),
        ('```json\n{"name": "Ann"}\n```\n```python\nprint(1)\n```', 1.0, 1.0),
        ('{"age": 3}', 1.0, 0.0),
        ('{"name": "Ann", "age": -1}', 1.0, 0.0),
        ('{"name": "Ann", "more": 1}', 1.0, 0.0),
        ("[]", 1.0, 0.0),
        ("null", 1.0, 0.0),
        ('{"name": "Ann"', 0.0, 0.0),
        ('My JSON: {"name": "Ann"}', 0.0, 0.0),
        ('{"name": "Ann", "name": "Bob"}', 0.0, 0.0),
        ('{"name": NaN}', 0.0, 0.0),
        ("```json\n{", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_responses(text: str, json_found: float, value: float) -> None:
    score = judge(text)
    assert (score.value, score.components) == (value, {"json": json_found, "valid": value})
    assert score.trace


def test_reading() -> None:
    assert read_json("null") == (None,)
    assert read_json("x") is None
    assert last_fenced_block("no block") is None
    assert last_fenced_block("```json\n1\n```\n```text\n2\n```") == "\n1\n"
    assert judge('{"age": -1}').trace.startswith("at $")


def test_schemas_as_text_booleans_and_older_drafts() -> None:
    assert judge('{"name": "Ann"}', json.dumps(SCHEMA)).value == 1.0
    assert judge("3", True).value == 1.0
    assert judge("3", False).value == 0.0
    draft4 = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}
    assert [judge(text, draft4).value for text in ("3", "4")] == [0.0, 1.0]


def test_schemas_that_cannot_be_used() -> None:
    for schema, reason in (
        (None, "no_column"),
        (3, "bad_schema"),
        ({"type": "strin"}, "bad_schema"),
        ("", "bad_schema"),
    ):
        with pytest.raises(CannotJudgeError, match=f"^{reason}: "):
            judge("3", schema)


def test_a_remote_reference_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        pytest.fail("a schema from the data must not reach the network")

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    with pytest.raises(Exception, match="Unresolvable"):  # an invalid score where a process judges
        judge("3", {"$ref": "http://127.0.0.1:9/schema.json"})


def test_one_schema_for_all(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    config = JsonSchema.Config(schema_file=path)
    assert JsonSchema.traits(config).columns == ()
    assert JsonSchema.check(config) == []
    assert judge('{"name": "Ann"}', None, schema_file=path).value == 1.0
    assert JsonSchema.traits(JsonSchema.Config(schema_column="s")).columns == ("s",)
    with pytest.raises(ValidationError, match="no effect"):
        JsonSchema.Config(schema_file=path, schema_column="s")
    path.write_text("{")
    assert "bad_schema: not JSON" in JsonSchema.check(config)[0]
    path.write_text('{"type": "strin"}')
    assert "not a JSON schema" in JsonSchema.check(config)[0]
    path.unlink()
    assert "cannot be read" in JsonSchema.check(config)[0]


def test_columns_as_data_libraries_give_them() -> None:
    array = np.array(["a", "b"])
    assert judge('"a"', {"enum": array}).value == 1.0
    assert judge('"c"', {"enum": array}).value == 0.0
    with pytest.raises(CannotJudgeError, match=r"^bad_schema: "):
        judge("3", {"enum": [object()]})
    with pytest.raises(CannotJudgeError, match=r"^bad_column: "):
        judge("3", "[" * 100_000)
