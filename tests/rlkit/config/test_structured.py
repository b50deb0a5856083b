"""What responses must match: from options, files and columns, before vLLM sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit.config.structured import StructuredConfig, grammar, split_unusable
from rlkit.data.base import Problem
from rlkit.experience import Message

SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}


def test_each_kind_becomes_its_grammar(tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(SCHEMA))
    assert grammar(StructuredConfig(regex="[0-9]+"), {}) == {"regex": "[0-9]+"}
    assert grammar(StructuredConfig(choices=("yes", "no")), {}) == {"choice": ["yes", "no"]}
    for schema in (SCHEMA, str(file)):
        (kind, text), *_ = grammar(StructuredConfig(json_schema=schema), {}).items()
        assert (kind, json.loads(text)) == ("json", SCHEMA)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("regex", "a|b", {"regex": "a|b"}),
        ("choices", ["a", "b"], {"choice": ["a", "b"]}),
        ("choices", '["a", "b"]', {"choice": ["a", "b"]}),  # as CSV has it
        ("choices", np.array(["a", "b"], dtype=object), {"choice": ["a", "b"]}),  # as Parquet has it
        ("json_schema", SCHEMA, {"json": json.dumps(SCHEMA)}),
        ("json_schema", json.dumps(SCHEMA), {"json": json.dumps(SCHEMA)}),
    ],
)
def test_a_column_holds_each_problem_s_own(kind: str, value: Any, expected: dict[str, Any]) -> None:
    assert grammar(StructuredConfig(**{kind: "column:own"}), {"own": value}) == expected


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("regex", None, "column 'own' is empty"),
        ("regex", 3, "3 is not a regular expression"),
        ("regex", "(", "is not a regular expression: missing"),
        ("choices", "yes", "'yes' is not JSON"),
        ("choices", {"a": 1}, "is not a list of texts"),
        ("choices", [1, 2], "must be a list of texts"),
        ("choices", [], "none of them empty"),
        ("json_schema", "[1]", "is not a JSON schema, which must be an object"),
        ("json_schema", {"type": "objekt"}, "is not a JSON schema: 'objekt'"),
    ],
)
def test_a_row_with_an_unusable_value_is_a_bad_row(kind: str, value: Any, reason: str) -> None:
    good_value = {"regex": "a", "choices": ["a"], "json_schema": {}}[kind]
    messages = (Message("user", "?"),)
    good = Problem("1", messages, columns={"own": good_value}, origin="d.jsonl:1")
    wrong = Problem("2", messages, columns={"own": value}, origin="d.jsonl:2")
    kept, (bad,) = split_unusable(StructuredConfig(**{kind: "column:own"}), [good, wrong])
    assert kept == [good]
    assert bad.origin == "d.jsonl:2"
    assert bad.reason.startswith(f"rollout.structured.{kind}: ")
    assert reason in bad.reason


def test_without_a_column_every_problem_is_kept() -> None:
    problems = [Problem("1", (Message("user", "?"),))]
    assert split_unusable(None, problems) == (problems, [])
    assert split_unusable(StructuredConfig(regex="a"), problems) == (problems, [])
