"""Which rollout worker may sample: a pure state machine per worker. No Ray, no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class State(Enum):
    """What a worker is doing."""

    STARTING = "starting"
    """Its engine loads; it has no weights of the run yet."""
    READY = "ready"
    """It holds confirmed weights."""
    DEAD = "dead"
    """Its process is gone, or is not to be used any more, and may be replaced."""
    GIVEN_UP = "given up"
    """It was lost more often than allowed."""


class NotInThisStateError(RuntimeError):
    """An event that cannot happen to a worker in this state: the pool has lost track of it."""


@dataclass(frozen=True)
class Health:
    """Immutable: every event gives the next state."""

    max_restarts: int
    state: State = State.STARTING
    version: int | None = None
    """Of the weights that it confirmed."""
    restarts: int = 0

    def confirmed(self, version: int) -> Health:
        """It holds weights of this version and samples as the learner does."""
        self._must_be(State.STARTING, State.READY)
        return replace(self, state=State.READY, version=version)

    def died(self) -> Health:
        """Its process is gone, or could not confirm its weights. Hearing it again changes nothing."""
        if self.state in (State.DEAD, State.GIVEN_UP):
            return self
        state = State.DEAD if self.restarts < self.max_restarts else State.GIVEN_UP
        return replace(self, state=state, version=None)

    def restarted(self) -> Health:
        """A new process took its place; it may sample when it has confirmed its weights."""
        self._must_be(State.DEAD)
        return replace(self, state=State.STARTING, restarts=self.restarts + 1)

    def may_sample(self, version: int) -> bool:
        """Whether it may take work for the policy's present version."""
        return self.state is State.READY and self.version == version

    def _must_be(self, *allowed: State) -> None:
        if self.state not in allowed:
            raise NotInThisStateError(f"a worker that is {self.state.value} cannot do this")
