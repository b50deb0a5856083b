"""When a run is saved, which of its policies is the best, and how signals stop it. No Ray, no files."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from rlkit.config.schema import TrainerConfig


@dataclass(frozen=True)
class Best:
    step: int
    value: float


class SaveSchedule:
    """Decides from steps, evaluations and checkpoints when the next checkpoint is due."""

    def __init__(self, config: TrainerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.clock = config, clock
        self.saved_at = clock()
        self.saved: int | None = None
        """The step last saved, or resumed from."""
        self.best: Best | None = None
        self.improved = False
        """Whether there is a new best policy since the last checkpoint."""
        self.metric = config.best_metric or "accuracy/heldout"
        """`trainer.best_metric`, or the headline of the evaluations if that is not set."""
        self.seen = False
        """Whether `metric` was ever reported."""

    def due(self, step: int) -> bool:
        trainer = self.config
        if step == trainer.total_steps or self.improved:
            return True
        if trainer.save_every_steps and step % trainer.save_every_steps == 0:
            return True
        minutes = (self.clock() - self.saved_at) / 60
        return bool(trainer.save_every_minutes) and minutes >= trainer.save_every_minutes

    def was_saved(self, step: int) -> None:
        self.saved, self.saved_at, self.improved = step, self.clock(), False

    def evaluated(self, step: int, metrics: Mapping[str, float], headline: str | None = None) -> None:
        """Note the latest known `metrics`, and the `headline` of an evaluation. Only a better policy replaces the one
        before training as the best."""
        self.metric = self.config.best_metric or headline or self.metric
        value = metrics.get(self.metric)
        self.seen |= value is not None
        if value is None or not math.isfinite(value) or (self.best is not None and value <= self.best.value):
            return
        self.improved |= step > 0
        self.best = Best(step, value)

    def missing(self, metrics: Mapping[str, float]) -> str | None:
        """Return a message if steps and evaluations have been reported, but never `trainer.best_metric`."""
        name = self.metric
        if self.seen or name in metrics:
            return None
        near = get_close_matches(name, metrics, 1)
        hint = f"did you mean {near[0]}?" if near else f"the metrics are {', '.join(sorted(metrics))}"
        return f"trainer.best_metric={name}: no step or evaluation reports it, so no best checkpoint is kept; {hint}"

    def state_dict(self) -> dict[str, Any]:
        best = None if self.best is None else [self.best.step, self.best.value]
        return {"best": best, "seen": self.seen, "metric": self.metric}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = None if state["best"] is None else Best(*state["best"])
        self.seen = state["seen"]
        self.metric = self.config.best_metric or state.get("metric", self.metric)


class StoppedError(Exception):
    """A signal asked the run to stop."""

    orderly = True
    """Nothing failed, so Ray's logs are not kept."""

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal


class Stop:
    """The first signal asks training to stop when a step is complete; a second one, or one outside of training, cancels
    the run at once."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.signal: signal.Signals | None = None
        self.training = False
        self._asked = asyncio.Event()

    def on(self, number: signal.Signals) -> None:
        """Handle a signal on the event loop."""
        again, self.signal = self.signal is not None, number
        if again or not self.training:
            self.task.cancel()
        self._asked.set()

    async def asked(self) -> NoReturn:
        """Wait until the run is asked to stop, then raise StoppedError."""
        await self._asked.wait()
        self.check()
        raise AssertionError

    def check(self) -> None:
        if self._asked.is_set():
            assert self.signal is not None
            raise StoppedError(self.signal)
