"""What is known of a run at this moment: pure state with an injected clock, from which consoles draw."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_STEPS_TIMED = 20


@dataclass
class Phase:
    """Something the start-up waits for."""

    name: str
    began: float
    ended: float | None = None


@dataclass(frozen=True)
class ShownSample:
    """One response for people to read."""

    rank: str
    prompt: str
    response: str
    reward: float | None
    reason: str


class Progress:
    """Written by the tracker, read by the console's thread; both hold `lock`."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self.total_steps = total_steps
        self.clock = clock
        self.began = clock()
        self.phases: list[Phase] = []
        self.activities: dict[str, float] = {}
        """What goes on now, and since when."""
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.rewards: list[float] = []
        self.accuracies: list[tuple[int, float]] = []
        """Held-out accuracy by step."""
        self.warnings: dict[str, int] = {}
        """Message -> how often, the latest last."""
        self.sample: Sequence[ShownSample] = ()
        self._ends: deque[float] = deque(maxlen=_STEPS_TIMED + 1)

    def go_on_from(self, step: int, accuracies: Mapping[int, float]) -> None:
        """The run goes on after `step` steps of an earlier one."""
        self.step = step
        self.accuracies = sorted(accuracies.items())

    def begin_phase(self, name: str, parallel: bool) -> None:
        """A phase begins; earlier ones end, unless it runs beside them."""
        if not parallel:
            self.end_phases()
        self.phases.append(Phase(name, self.clock()))

    def end_phase(self, name: str) -> float:
        """A phase is over; seconds it took. Raises ValueError if none of that name is running."""
        for phase in self.phases:
            if phase.name == name and phase.ended is None:
                phase.ended = self.clock()
                return phase.ended - phase.began
        raise ValueError(f"no phase {name!r} is running")

    def end_phases(self) -> None:
        """All phases are over."""
        for phase in self.phases:
            if phase.ended is None:
                phase.ended = self.clock()

    def training_begins(self) -> None:
        """The first step begins now (the estimate of the time left counts from here)."""
        if not self._ends:
            self.end_phases()
            self._ends.append(self.clock())

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self.step = step
        self.metrics = self.metrics | dict(metrics)
        self._ends.append(self.clock())
        if "reward/mean" in metrics:
            self.rewards.append(metrics["reward/mean"])

    def end_evaluation(self, step: int, accuracy: float, metrics: Mapping[str, float]) -> None:
        """A held-out evaluation is done."""
        self.accuracies.append((step, accuracy))
        self.metrics = self.metrics | dict(metrics) | {"accuracy/heldout": accuracy}

    def add_warning(self, message: str) -> int:
        """How often this message has come by now."""
        count = self.warnings.pop(message, 0) + 1
        self.warnings[message] = count
        return count

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """From the pace of the last steps, evaluations between them included; None before the first step is done."""
        if len(self._ends) < 2:
            return None
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0.0, pace * (self.total_steps - self.step) - (self.clock() - self._ends[-1]))

    @property
    def now_doing(self) -> str:
        """`generate`, or the phases still running, in words; empty if nothing is known to go on."""
        if self.activities:
            return ", ".join(self.activities)
        return ", ".join(phase.name for phase in self.phases if phase.ended is None)
