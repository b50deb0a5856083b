"""The records a discriminator learns from, and their JSON Lines form (the official one)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.experience import UserError


@dataclass(frozen=True, slots=True)
class Triplet:
    """For one prompt: a reference, an answer that is closer to it (chosen) and one that is farther (rejected)."""

    prompt: str
    reference: str
    chosen: str
    rejected: str


class TripletError(UserError):
    """A line that is no triplet; the message names file, line and what is missing."""


def write_triplets(triplets: Iterable[Triplet], file: Path) -> None:
    """One JSON object per line: prompt, reference, chosen and rejected, each a list of messages."""
    with file.open("w", encoding="utf-8") as stream:
        for triplet in triplets:
            record = {"prompt": [{"role": "user", "content": triplet.prompt}]}
            for name in ("reference", "chosen", "rejected"):
                record[name] = [{"role": "assistant", "content": getattr(triplet, name)}]
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_triplets(file: Path) -> Iterator[Triplet]:
    """The triplets of a file; each field is a list of messages or a plain string. Raises TripletError."""
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
                fields = {name: _text(record[name]) for name in ("prompt", "reference", "chosen", "rejected")}
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise TripletError(f"{file}:{number}: no triplet ({type(error).__name__}: {error})") from error
            yield Triplet(**fields)


def _text(value: Any) -> str:
    """Messages become their contents, one per line; roles are dropped (POLAR reads plain text)."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)
