"""A line of samples.jsonl as the index keeps it. Older runs lack fields; what is unknown is None."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SEARCHED = 4096
"""Characters at the beginning of a prompt and of a response that full text search knows."""
HEAD = 200
MOST_COMPONENTS = 100
COLUMNS = {
    "id": "INTEGER PRIMARY KEY", "start": "INTEGER", "bytes": "INTEGER", "step": "INTEGER", "group_id": "TEXT",
    "prompt_id": "TEXT", "sample": "INTEGER", "rank": "TEXT", "reward": "REAL", "advantage": "REAL",
    "length": "INTEGER", "correct": "REAL", "verdict": "REAL", "finish_reason": "TEXT", "staleness": "REAL",
    "dropped": "TEXT", "valid": "INTEGER", "reason": "TEXT", "set": "TEXT", "kind": "TEXT", "group_size": "INTEGER",
    "group_mean": "REAL", "spread": "REAL", "digits": "REAL", "decoding": "TEXT",
}  # fmt: skip
"""`start` and `bytes`: where the row is in the file. `group_mean` and `spread` (largest minus smallest) are of the
rewards of the whole group, `digits` is their share of the response's characters, `decoding` is of an evaluation."""
_NO_DIGITS = str.maketrans("", "", "0123456789")


@dataclass(frozen=True)
class Indexed:
    number: int
    columns: tuple[Any, ...]
    """In the order of `COLUMNS`."""
    heads: tuple[int, str, str]
    texts: tuple[int, str, str]
    components: dict[str, float]


def indexed(row_number: int, start: int, line: bytes) -> Indexed | None:
    """None for a line that is no row."""
    row = parsed(line)
    if not row:
        return None
    prompt, response = said(row.get("prompt")), said(row.get("response"))
    searched = response[:SEARCHED]
    rewards = [r for r in map(number, _list(row.get("group_rewards"))) if r is not None]
    own = row.get("components")
    components = {_text(k) or "": number(v) for k, v in own.items()} if isinstance(own, Mapping) else {}
    length = whole(row.get("length"))
    if length is None and isinstance(row.get("token_ids"), list):
        length = len(row["token_ids"])
    reported = components.get("correct", components.get("success"))
    correct = number(row.get("correct")) if "correct" in row else reported
    columns = {
        "id": row_number,
        "start": start,
        "bytes": len(line),
        "step": whole(row.get("step")) or 0,
        "group_id": _text(row.get("group_id")) or "",
        "prompt_id": _text(row.get("prompt_id")) or "",
        "sample": whole(row.get("sample")) or 0,
        "rank": _text(row.get("rank")),
        "reward": number(row.get("reward")),
        "advantage": number(row.get("advantage")),
        "length": length,
        "correct": correct,
        "verdict": number(row.get("verdict")),
        "finish_reason": _text(row.get("finish_reason")),
        "staleness": number(row.get("staleness")),
        "dropped": _text(row.get("dropped")),
        "valid": int(bool(row.get("valid", True))),
        "reason": _text(row.get("reason")) or "",
        "set": _text(row.get("set")),
        "kind": _text(row.get("kind")) or "training",
        "group_size": whole(row.get("group_size")),
        "group_mean": sum(rewards) / len(rewards) if rewards else None,
        "spread": max(rewards) - min(rewards) if rewards else None,
        "decoding": _text(row.get("decoding")),
        "digits": 1 - len(searched.translate(_NO_DIGITS)) / len(searched) if searched else None,
    }
    kept = [(name, value) for name, value in components.items() if value is not None][:MOST_COMPONENTS]
    return Indexed(
        row_number,
        tuple(columns[name] for name in COLUMNS),
        (row_number, said(row.get("prompt"), last=True)[:HEAD], response[:HEAD]),
        (row_number, prompt[:SEARCHED], searched),
        dict(kept),
    )


def parsed(line: bytes) -> dict[str, Any]:
    """Empty for what is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def whole(value: Any) -> int | None:
    """A whole number of at most 53 bits, or None."""
    result = number(value)
    return None if result is None or abs(result) > 2**53 else int(result)


def said(prompt: Any, last: bool = False) -> str:
    """The text of a prompt (messages), or of its last message alone; of a response."""
    if isinstance(prompt, str):
        text = prompt
    else:
        texts = [str(m.get("content") or "") for m in _list(prompt) if isinstance(m, Mapping)]
        text = "\n".join(texts[-1:] if last else texts)
    return _text(text) or ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    """Half a surrogate pair is no UTF-8."""
    return None if value is None else str(value).encode("utf-8", "replace").decode("utf-8")
