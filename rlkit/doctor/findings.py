"""Findings, which are reported one per line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    name: str
    text: str
    level: Literal["ok", "note", "lacks"] = "ok"
    """`lacks`: a run would not start, or not work."""


def lines(title: str, findings: Sequence[Finding]) -> list[str]:
    width = max(len(finding.name) for finding in findings)
    return [title, *(f"  {finding.level:<5}  {finding.name:<{width}}  {finding.text}" for finding in findings)]


def lacking_names(findings: Sequence[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.level == "lacks"]
