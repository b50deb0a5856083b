"""Readers of a row's cells: a text, a number, chat messages. Each function raises RowError for anything else."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from rlkit.experience import Message
from rlkit.experience.texts import encodable

Row = Mapping[str, Any]
Chat = tuple[Message, ...]

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
"""ShareGPT's role names -> rlkit's."""
_FROM = {*_ROLES, *_ROLES.values(), "system"}
_LABELS = (
    "Write labels as true or false, or as numbers from 0 (bad) to 1 (good). Numbers of any size are scores "
    "(data.score_column), for algorithms that compare responses"
)


class RowError(ValueError):
    """This row cannot be used; the message is the reason."""

    def __init__(self, reason: str, remedy: str = "", *, systematic: bool = False) -> None:
        """`remedy`, `systematic`: as in `BadRow`."""
        super().__init__(reason)
        self.remedy, self.systematic = remedy, systematic


def cell(row: Row, column: str) -> Any:
    """Return the value of a column, which must not be null; `outer.inner` is a column inside another."""
    value = row[column] if column in row else _inner(row, column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError(f"{column} is null")
    if _is_torn(value):
        raise RowError(
            f"{column} has half of a character (a lone surrogate such as \\ud83d), which no tokenizer accepts"
        )
    return value


def _is_torn(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and encodable(value) != value
    if isinstance(value, Mapping):
        return any(map(_is_torn, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_is_torn, value))


def _inner(row: Row, column: str) -> Any:
    outer, dot, rest = column.partition(".")
    if dot and isinstance(row.get(outer), Mapping):
        try:
            return cell(row[outer], rest)
        except RowError as error:
            raise RowError(f"in {outer}: {error}") from error
    near = difflib.get_close_matches(column, row, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(row) or 'none'}"
    raise RowError(f"no column {column!r} ({hint})")


def text(value: Any, what: str) -> str:
    """Return the text, which must contain more than white space."""
    if isinstance(value, Mapping) and value:
        raise RowError(f"{what} has columns inside it; name one of them: {', '.join(f'{what}.{key}' for key in value)}")
    if not isinstance(value, str):
        raise RowError(f"{what} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{what} is empty")
    return value


def number(row: Row, column: str) -> float:
    """Return a finite number; true is 1."""
    value = cell(row, column)
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise RowError(f"{column} must be a finite number, not {value!r}")
    return float(value)


def label(value: Any, what: str) -> float:
    """Return a label from 0 (wrong) to 1 (right)."""
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
        reason = f"{what} must be true, false or a number from 0 to 1, not {value!r}"
        raise RowError(reason, _LABELS, systematic=True)
    return float(value)


def message(value: Any, what: str) -> Message:
    """Read `{"role": ..., "content": ...}` or ShareGPT's `{"from": ..., "value": ...}`. Assistants' may be empty."""
    if not isinstance(value, Mapping):
        raise RowError(f"{what} must be a chat message with role and content, not {type(value).__name__}")
    keys = ("from", "value") if value.get("role") is None and value.get("from") is not None else ("role", "content")
    for key in keys:
        if key not in value:
            raise RowError(f"{what} has no {key!r}")
    role = text(value[keys[0]], f"{what}.{keys[0]}")
    if keys[0] == "from" and role not in _FROM:
        raise RowError(f"{what}.from is {role!r}, which is not a known role: {', '.join(sorted(_FROM))}")
    role = _ROLES.get(role, role)
    content = value[keys[1]]
    if role == "assistant" and isinstance(content, str):  # an empty response is valid: the model ended at once
        return Message(role, content)
    return Message(role, text(content, f"{what}.{keys[1]}"))


def chat(value: Any, what: str) -> Chat:
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{what} must be a list of chat messages, not {type(value).__name__}")
    if not value:
        raise RowError(f"{what} is an empty list")
    return tuple(message(item, f"{what}[{i}]") for i, item in enumerate(value))


def prompt_of(row: Row, column: str) -> Chat:
    """Return the prompt as chat messages; a text becomes one user message."""
    value = cell(row, column)
    if isinstance(value, str):
        return (Message("user", text(value, column)),)
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column} must be a text or a list of chat messages, not {type(value).__name__}")
    messages = chat(value, column)
    if messages[-1].role == "assistant":
        raise RowError(f"{column} ends with an assistant message: there is nothing to answer")
    return messages


def turns(value: Any, what: str) -> Chat:
    """Return the messages of a response (a text, a message or several) or of a whole conversation. The last message
    must be the assistant's."""
    if isinstance(value, str):
        return (Message("assistant", value),)
    messages = (message(value, what),) if isinstance(value, Mapping) else chat(value, what)
    if messages[-1].role != "assistant":
        raise RowError(f"{what} does not end with a message of the assistant")
    return messages


def conversation(value: Any, what: str) -> tuple[Chat, str]:
    """Split a conversation into its prompt and its last message, the response."""
    messages = chat(value, what)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise RowError(f"{what} is a chat, so it must have a prompt and end with the assistant's message")
    return messages[:-1], messages[-1].content
