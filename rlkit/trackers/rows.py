"""Rows of samples.jsonl in the form that trackers show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
TEXTS_PER_RUN = 100


def texts_are_due(step: int, total_steps: int) -> bool:
    """Whether to send texts: W&B shows the last hundred parts of a table, and MLflow rewrites its table for each."""
    return step <= 1 or step % max(1, total_steps // TEXTS_PER_RUN) == 0


def best_and_worst(rows: Sequence[Row], groups: int | None) -> list[Row]:
    """Return the rows that represent the `groups` trained groups (None: all) with the widest spread of rewards."""
    ranked: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("rank") is not None and row.get("dropped") is None:
            ranked.setdefault(str(row.get("group_id")), []).append(row)
    chosen = sorted(ranked.values(), key=_spread, reverse=True)[:groups]
    return [row for group in chosen for row in group]


def _spread(rows: Sequence[Row]) -> float:
    rewards = [row["reward"] for row in rows if isinstance(row.get("reward"), (int, float))]
    return max(rewards) - min(rewards) if rewards else -1.0


def conversation(row: Row) -> list[dict[str, str]]:
    """Return the prompt, and the response or the turns of an episode, as messages."""
    turns = row.get("turns") or [{"role": "assistant", "content": row.get("response") or ""}]
    messages = [*(row.get("prompt") or ()), *turns]
    return [{"role": str(message.get("role", "")), "content": _said(message)} for message in messages]


def _said(message: Mapping[str, Any]) -> str:
    calls = [
        f"[no call: {call['error']}]" if call.get("error") else f"{call.get('name')}({json.dumps(call['arguments'])})"
        for call in message.get("calls") or ()
    ]
    return " ".join([*([str(message["content"])] if message.get("content") else []), *calls])


def prompt_text(row: Row) -> str:
    """Return the prompt's text: its only message, or all messages with their roles."""
    messages = row.get("prompt") or []
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def response_text(row: Row) -> str:
    said = conversation(row)[len(row.get("prompt") or ()) :]
    if not row.get("turns"):
        return said[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in said)


def facts(row: Row) -> dict[str, Any]:
    """Return the facts about a sample other than its texts; the keys are the same for every row."""
    return {
        "group": row.get("group_id"),
        "sample": row.get("sample"),
        "rank": row.get("rank"),
        "reward": row.get("reward"),
        "components": json.dumps(row.get("components") or {}, ensure_ascii=False),
        "advantage": row.get("advantage"),
        "correct": row.get("correct"),
        "length": row.get("length"),
        "finish_reason": row.get("finish_reason"),
        "invalid": None if row.get("valid", True) else str(row.get("reason")),
    }


COLUMNS = ("step", "prompt", "response", "answer", *facts({}))


def table_row(step: int, row: Row) -> list[Any]:
    """Return the values of `COLUMNS`."""
    return [step, prompt_text(row), response_text(row), row.get("answer"), *facts(row).values()]
