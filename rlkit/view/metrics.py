"""metrics.jsonl as columns, read incrementally by byte offset."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkit.view.rows import Position, number, parsed, read_on, whole

AREAS = (
    "accuracy", "reward", "preference", "evaluation", "group", "policy", "kl", "advantage", "length", "environment",
    "mismatch", "staleness", "critic", "prm", "prime", "time", "tokens", "buffer", "weights", "data",
)  # fmt: skip
"""Order of the areas: first these, then the others by name."""
_NO_METRICS = {"kind", "step", "policy_version", "time", "seconds"}


@dataclass
class Table:
    """One line per step (the last, if there are several); columns have an entry per line."""

    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return sorted(self.lines)

    def column(self, name: str) -> list[float | None]:
        return [number(self.lines[step].get(name)) for step in self.steps]

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) where there is a value."""
        return [(step, value) for step in self.steps if (value := number(self.lines[step].get(name))) is not None]


class Metrics:
    """The metrics of one run; call `follow` before reading."""

    def __init__(self, run: Path) -> None:
        self._file = run / "metrics.jsonl"
        self._position, self._known = Position(), set[str]()
        self._lock = threading.Lock()
        self.training, self.evaluation = Table(), Table()
        self.began: float | None = None
        self.updated: float | None = None
        """Unix seconds of the last line; `began`: of the first."""

    def follow(self) -> None:
        with self._lock:
            at_end = False
            while not at_end:
                read = read_on(self._file, self._position)
                if read.restarted:
                    self.training, self.evaluation, self.began, self.updated = Table(), Table(), None, None
                    self._known = set()
                for _, line in read.lines:
                    self._add(parsed(line))
                self._position, at_end = read.position, read.at_end

    def _add(self, line: dict[str, Any]) -> None:
        step = whole(line.get("step"))
        if step is None:
            return
        (self.evaluation if line.get("kind") == "evaluation" else self.training).lines[step] = line
        self.updated = number(line.get("time"))
        self.began = self.updated if self.began is None else self.began
        self._known |= line.keys() - _NO_METRICS

    @property
    def names(self) -> list[str]:
        order = {area: place for place, area in enumerate(AREAS)}
        return sorted(self._known, key=lambda name: (order.get(name.partition("/")[0], len(order)), name))

    @property
    def step(self) -> int:
        return max(self.training.lines, default=0)
