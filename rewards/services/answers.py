"""Strict reading of language models' answers: one JSON object, or the text between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


class Unparsable(ValueError): ...


def guided_decoding(schema: Mapping[str, Any], name: str = "verdict") -> dict[str, Any]:
    """Return request fields that make the answer follow the schema."""
    named = {"name": name, "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def strip_thinking(answer: str) -> str:
    """Drop the model's thinking; raise Unparsable if nothing is left."""
    text = answer.rpartition("</think>")[2].strip()
    if not text:
        raise Unparsable("the answer is empty")
    return text


def json_object(answer: str) -> dict[str, Any]:
    """Parse the one JSON object, which may be in a code fence; raise Unparsable."""
    text = strip_thinking(answer)
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, re.DOTALL)
    try:
        content = json.loads(fenced[1] if fenced else text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise Unparsable(f"the answer is not one JSON object: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise Unparsable("the answer is not one JSON object: nested too deeply") from error
    except Unparsable:
        raise
    except ValueError as error:  # Python does not parse numbers of more than 4,300 digits
        raise Unparsable(f"the answer cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Unparsable(f"the answer is not a JSON object but {type(content).__name__}")
    return content


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise Unparsable("the answer has a duplicate key")
    return content


def tagged_answer(text: str) -> str | None:
    """Return the text between the last pair of <answer> and </answer>."""
    before, end, _ = text.rpartition("</answer>")
    _, start, inside = before.rpartition("<answer>")
    return inside.strip() if end and start else None
