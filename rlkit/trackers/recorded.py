"""Reads the folders of finished, killed and still running runs."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from rlkit.experience import UserError

NOT_NUMBERS = ("kind", "step", "policy_version", "time", "seconds")
"""Keys of a record in metrics.jsonl that are not metrics."""


class RecordedRun:
    """The folder of a run. Raises UserError if `folder` holds no run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        if not self.metrics.is_file():
            raise UserError(f"{folder} holds no run: there is no metrics.jsonl; name the folder that was run_dir")
        file = self.folder / "config.yaml"
        self.config: dict[str, Any] = (yaml.safe_load(file.read_text()) if file.is_file() else None) or {}
        self.ended = (self.folder / "summary.json").is_file()

    def goes_on(self) -> bool:
        """Whether a process holds the folder's lock."""
        try:
            with (self.folder / "logs" / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl that have a step and a time."""
        for record in rows(self.metrics):
            if isinstance(record.get("step"), int) and isinstance(record.get("time"), (int, float)):
                yield record

    def steps(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield (step, its rows in samples.jsonl)."""
        for step, group in groupby(rows(self.samples), lambda row: row.get("step")):
            if isinstance(step, int):
                yield step, list(group)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSON Lines file. Other lines, such as a half-written last one, are skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a record; "NaN" and "Infinity" count as numbers."""
    values = {}
    for name, value in record.items():
        if name not in NOT_NUMBERS and not isinstance(value, bool):
            try:
                values[name] = float(value)
            except (TypeError, ValueError):
                continue
    return values
