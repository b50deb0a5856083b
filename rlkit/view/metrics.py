"""metrics.jsonl in columns, read on by offset."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlkit.view.lines import Position, read_on
from rlkit.view.rows import number, parsed, whole

Kind = Literal["training", "evaluation"]
AREAS = (
    "accuracy", "reward", "preference", "evaluation", "group", "policy", "kl", "advantage", "length", "environment",
    "mismatch", "staleness", "critic", "prm", "prime", "time", "tokens", "buffer", "weights", "data",
)  # fmt: skip
"""First these, then others by name."""
_NO_METRICS = {"kind", "step", "policy_version", "time", "seconds"}


@dataclass
class Table:
    """One line per step (of several, the last); columns have a place for each line."""

    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return sorted(self.lines)

    def column(self, name: str) -> list[float | None]:
        return [number(self.lines[step].get(name)) for step in self.steps]

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) where there is one."""
        values = zip(self.steps, self.column(name), strict=True)
        return [(step, value) for step, value in values if value is not None]

    def last(self, name: str) -> float | None:
        return next((value for _, value in reversed(self.points(name))), None)


class Metrics:
    """Of one run; `follow` before reading."""

    def __init__(self, run: Path) -> None:
        self._file = run / "metrics.jsonl"
        self._position = Position()
        self._lock = threading.Lock()
        self.training, self.evaluation = Table(), Table()
        self.names: list[str] = []
        self.began: float | None = None
        self.updated: float | None = None
        """Unix seconds of the first and the last line."""

    def follow(self) -> None:
        with self._lock:
            at_end, known = False, set(self.names)
            while not at_end:
                read = read_on(self._file, self._position)
                if read.restarted:
                    self.training, self.evaluation, known, self.began, self.updated = (
                        Table(),
                        Table(),
                        set(),
                        None,
                        None,
                    )
                for _, line in read.lines:
                    known |= self._add(parsed(line))
                self._position, at_end = read.position, read.at_end
            self.names = sorted(known, key=_by_area)

    def _add(self, line: dict[str, Any]) -> set[str]:
        step = whole(line.get("step"))
        if step is None:
            return set()
        table = self.evaluation if line.get("kind") == "evaluation" else self.training
        table.lines[step] = line
        self.updated = number(line.get("time"))
        self.began = self.updated if self.began is None else self.began
        return {name for name in line if name not in _NO_METRICS}

    @property
    def step(self) -> int:
        return max([0, *self.training.lines])


def _by_area(name: str) -> tuple[int, str]:
    area = name.partition("/")[0]
    return AREAS.index(area) if area in AREAS else len(AREAS), name
