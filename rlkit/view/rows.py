"""Growing files of JSON lines: read incrementally by byte offset, with values that may be missing or malformed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rlkit.experience.texts import encodable

CHECKED_BYTES = 1024
"""Bytes before the current offset that are hashed to detect a changed file. A resumed run truncates its files and may
then write beyond this offset; a copy that is synchronised again has another inode and the same beginning."""


class Position(NamedTuple):
    offset: int = 0
    number: int = 0
    """Number of lines before the offset."""
    check: str = ""


@dataclass(frozen=True)
class Read:
    lines: list[tuple[int, bytes]]
    """(offset, line without its end) of complete lines only."""
    position: Position
    restarted: bool
    """Whether the file was replaced or truncated, so that these lines are its first."""
    at_end: bool
    """Whether at most an incomplete line is left."""


def read_on(path: Path, position: Position, at_most: int = 4 * 2**20) -> Read:
    """Read the next complete lines, about `at_most` bytes of them. A missing file counts as empty."""
    try:
        with path.open("rb") as file:
            restarted = _check(file, position.offset) != position.check
            start = Position() if restarted else position
            data, at_end = b"", False
            file.seek(start.offset)
            while b"\n" not in data and not at_end:  # one line may be longer
                more = file.read(at_most)
                at_end = len(more) < at_most
                data += more
            lines, offset = [], start.offset
            for line in data.split(b"\n")[:-1]:
                lines.append((offset, line))
                offset += len(line) + 1
            return Read(lines, Position(offset, start.number + len(lines), _check(file, offset)), restarted, at_end)
    except FileNotFoundError:
        return Read([], Position(), position != Position(), True)


def _check(file: BinaryIO, offset: int) -> str:
    """Return a hash of the bytes before `offset`; for a shorter file, a text that differs from any hash."""
    if offset == 0:
        return ""
    start = max(0, offset - CHECKED_BYTES)
    file.seek(start)
    data = file.read(offset - start)
    return hashlib.sha256(data).hexdigest() if len(data) == offset - start else "shorter"


def parsed(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line; empty for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def number(value: Any) -> float | None:
    """Return a finite number, or None."""
    try:
        result = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def whole(value: Any) -> int | None:
    """Return an integer of at most 53 bits, or None."""
    result = number(value)
    return None if result is None or abs(result) > 2**53 else int(result)


def text(value: Any) -> str | None:
    return None if value is None else encodable(str(value))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def said(prompt: Any, last: bool = False) -> str:
    """Return the text of a response or of a prompt (messages), or only that of its last message."""
    if not isinstance(prompt, str):
        texts = [str(m.get("content") or "") for m in listed(prompt) if isinstance(m, Mapping)]
        prompt = "\n".join(texts[-1:] if last else texts)
    return text(prompt) or ""
