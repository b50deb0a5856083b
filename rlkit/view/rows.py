"""Files of JSON lines that grow: read on by offset, with values that may be missing or odd."""

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
"""Hashed before the place where reading goes on. A resumed run cuts its files and writes on, perhaps beyond that
place; a copy that is synchronised anew has another inode and the same beginning."""


class Position(NamedTuple):
    offset: int = 0
    number: int = 0
    """Lines before it."""
    check: str = ""


@dataclass(frozen=True)
class Read:
    lines: list[tuple[int, bytes]]
    """(offset, line without its end) of whole lines alone."""
    position: Position
    restarted: bool
    """The file is another one, or was cut: these lines are its first."""
    at_end: bool
    """Nothing but half a line is left."""


def read_on(path: Path, position: Position, at_most: int = 4 * 2**20) -> Read:
    """The next whole lines, about `at_most` bytes of them. A file that is not there is empty."""
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
    """Of what stands before `offset`; of a shorter file something else."""
    if offset == 0:
        return ""
    start = max(0, offset - CHECKED_BYTES)
    file.seek(start)
    data = file.read(offset - start)
    return hashlib.sha256(data).hexdigest() if len(data) == offset - start else "shorter"


def parsed(line: bytes) -> dict[str, Any]:
    """Empty for what is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        result = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def whole(value: Any) -> int | None:
    """A whole number of at most 53 bits, or None."""
    result = number(value)
    return None if result is None or abs(result) > 2**53 else int(result)


def text(value: Any) -> str | None:
    return None if value is None else encodable(str(value))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def said(prompt: Any, last: bool = False) -> str:
    """The text of a prompt (messages), or of its last message alone; of a response."""
    if not isinstance(prompt, str):
        texts = [str(m.get("content") or "") for m in listed(prompt) if isinstance(m, Mapping)]
        prompt = "\n".join(texts[-1:] if last else texts)
    return text(prompt) or ""
