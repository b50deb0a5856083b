"""Reads on in a file of lines that grows, and notices when it is no longer the file it was."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHECKED_BYTES = 1024
"""Hashed before the place where reading goes on. A resumed run cuts its files and writes on, perhaps beyond that
place; a copy that is synchronised anew has another inode and the same beginning."""


@dataclass(frozen=True)
class Position:
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
            return _read(file, start, restarted, at_most)
    except FileNotFoundError:
        return Read([], Position(), position != Position(), True)


def _read(file: BinaryIO, start: Position, restarted: bool, at_most: int) -> Read:
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


def _check(file: BinaryIO, offset: int) -> str:
    """Of what stands before `offset`; of a shorter file something else."""
    if offset == 0:
        return ""
    start = max(0, offset - CHECKED_BYTES)
    file.seek(start)
    data = file.read(offset - start)
    return hashlib.sha256(data).hexdigest() if len(data) == offset - start else "shorter"
