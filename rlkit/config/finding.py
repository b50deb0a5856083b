"""What a check of the configuration finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    key: str
    message: str
    warning: bool = False
    """The run may start; the user should know."""


Findings = Iterator[Finding]
