"""Decides which rollout workers may sample, by a pure state machine per worker. No Ray, no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class State(Enum):
    STARTING = "starting"
    """Loading its engine; it does not have the run's weights yet."""
    READY = "ready"
    """It holds confirmed weights."""
    DEAD = "dead"
    """Dead or unusable; it may be replaced."""
    GIVEN_UP = "given up"
    """Died more often than allowed."""


class NotInThisStateError(RuntimeError):
    """Raised for an event that cannot happen in this state: a bug in the pool."""


@dataclass(frozen=True)
class Health:
    """Immutable: every event returns the next state."""

    max_restarts: int
    state: State = State.STARTING
    version: int | None = None
    """Version of the confirmed weights."""
    restarts: int = 0

    def confirmed(self, version: int) -> Health:
        self._must_be(State.STARTING, State.READY)
        return replace(self, state=State.READY, version=version)

    def died(self) -> Health:
        """Its process died, or could not confirm its weights. Idempotent."""
        if self.state in (State.DEAD, State.GIVEN_UP):
            return self
        state = State.DEAD if self.restarts < self.max_restarts else State.GIVEN_UP
        return replace(self, state=state, version=None)

    def restarted(self) -> Health:
        """A new process replaced it; it may sample once its weights are confirmed."""
        self._must_be(State.DEAD)
        return replace(self, state=State.STARTING, restarts=self.restarts + 1)

    def may_sample(self, version: int) -> bool:
        return self.state is State.READY and self.version == version

    def _must_be(self, *allowed: State) -> None:
        if self.state not in allowed:
            raise NotInThisStateError(f"a worker that is {self.state.value} cannot do this")
