"""Which rollout worker may sample, whatever happens to it in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rollout.health import Health, NotInThisStateError, State


def test_a_worker_samples_only_with_the_present_weights() -> None:
    worker = Health(max_restarts=1)
    assert not worker.may_sample(0)
    worker = worker.confirmed(0)
    assert worker.may_sample(0) and not worker.may_sample(1)
    worker = worker.confirmed(1).died()
    assert worker.state is State.DEAD and not worker.may_sample(1)
    worker = worker.restarted()
    assert not worker.may_sample(1)  # a new process has no weights of the run
    assert worker.confirmed(1).may_sample(1)
    assert worker.confirmed(1).died().state is State.GIVEN_UP


@pytest.mark.parametrize("event", ["confirmed", "restarted"])
def test_impossible_events_are_refused(event: str) -> None:
    with pytest.raises(NotInThisStateError):
        Health(0).died().confirmed(3) if event == "confirmed" else Health(0).restarted()


@given(st.integers(0, 3), st.lists(st.sampled_from(["confirmed", "died", "restarted"]), max_size=20))
def test_any_order_of_events(max_restarts: int, events: list[str]) -> None:
    worker, version = Health(max_restarts), 0
    for event in events:
        version += 1
        try:
            worker = worker.confirmed(version) if event == "confirmed" else getattr(worker, event)()
        except NotInThisStateError:
            continue
        assert worker.may_sample(version) == (event == "confirmed")
        assert worker.restarts <= max_restarts
        assert (worker.version is None) == (worker.state is not State.READY)
