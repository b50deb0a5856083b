"""The producer with the real pool and buffer on a virtual clock, and waiting beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.asynchrony import best, in_rounds, limit
from benchmarks.simulation import PROMPTS, Case, Run, simulate
from rlkit.data.order import PromptOrder
from rlkit.experience import Group, GroupScores, Sample, Score
from rlkit.experience.filters import BufferConfig
from rlkit.experience.scores import ScoreReport
from rlkit.experience.waiting_buffer import WaitingBuffer
from rlkit.producer import Producer, until
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.pool import Scored

SMALL = Case(engines=2, groups=2, samples=3, places=5, median=50, longest=400, steps=6, uncounted=2, start_seconds=10.0)
seconds = st.floats(0.0, 3.0)


def in_order(run: Run) -> bool:
    """Whether step t trained the groups asked for as number t n to t n + n - 1."""
    ids = [group_id for step in run.trained for group_id in step]
    return ids == [f"{i:08d}" for i in range(len(ids))] and len({len(step) for step in run.trained}) == 1


def that_ends(case: Case) -> WaitingBuffer:
    return WaitingBuffer(case.groups_per_step, case.staleness, BufferConfig(), last_step=case.steps)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), seconds, seconds, seconds,
    st.floats(0.1, 3.0), st.sampled_from([0.0, 40.0, 100.0]), st.integers(0, 2), st.integers(0, 3),
)  # fmt: skip
def test_what_a_step_trains_on_does_not_depend_on_timing(
    staleness: int, engines: int, groups: int, places: int, reward: float, publish: float, recompute: float,
    learner: float, death: float, evaluate: int, seed: int,
) -> None:  # fmt: skip
    """Nor on deaths and evaluations; no group is lost, none is older than the bound."""
    case = replace(
        SMALL, staleness=staleness, engines=engines, groups=groups, places=places, reward_seconds=reward,
        publish_seconds=publish, recompute_seconds=recompute / 1000, learner=learner, death_every=death,
        evaluate_every=evaluate, seed=seed,
    )  # fmt: skip
    run = simulate(case, that_ends)
    assert len(run.trained) == case.steps and in_order(run)
    assert min(run.staleness) >= 0 and max(run.staleness) <= staleness
    assert run.started == case.steps * case.groups_per_step, "more was sampled than is trained"


def test_the_simulated_synchronous_run_takes_what_can_be_calculated() -> None:
    case = replace(SMALL, staleness=0, reward_seconds=3.0)
    assert simulate(case).seconds_per_step(case.uncounted) == pytest.approx(in_rounds(case, overlap=False))


@pytest.mark.parametrize(("staleness", "at_least"), [(1, 1.7), (2, 2.2)])
def test_engines_and_learner_wait_little(staleness: int, at_least: float) -> None:
    """Full engines, long tails: groups start when responses of others end, not only when whole groups do."""
    case = Case(engines=4, groups=16, steps=14, staleness=staleness)
    took = simulate(case).seconds_per_step(case.uncounted)
    assert limit(case) < best(case)
    assert limit(case) < took < best(case) / 0.9
    synchronous = simulate(replace(case, staleness=0)).seconds_per_step(case.uncounted)
    assert synchronous > at_least * took


def test_what_a_step_no_longer_takes_is_asked_for_again_in_the_next() -> None:
    """A run that oversampled was saved in a step with four open groups, and goes on with two per step."""
    order, buffer = PromptOrder(PROMPTS, seed=0), WaitingBuffer(2, 0, BufferConfig())
    waits: dict[str, Any] = {"most_at_once": 2, "waits_for_places": False, "samples_per_prompt": 1, "greedy": False}
    producer = Producer(order, None, None, buffer, **waits, seed=0, step_timeout_seconds=1.0)  # type: ignore[arg-type]
    prompts = [prompt.id for prompt in order.take(4)]
    was_open = [{"id": f"{i:08d}", "prompt": prompt, "step": 3} for i, prompt in enumerate(prompts)]
    producer.load_state_dict({"order": order.state_dict(), "started": 4, "open": was_open})
    assert [(r.id, r.step, r.oldest) for r in producer._requests([3, 3])] == [("00000000", 3, 2), ("00000001", 3, 2)]
    assert [(r.id, r.step, r.oldest) for r in producer._requests([4, 4])] == [("00000002", 4, 3), ("00000003", 4, 3)]
    assert [(r.id, r.step) for r in producer._requests([5])] == [("00000004", 5)]


def test_places_of_a_larger_staleness_are_asked_for_at_once() -> None:
    """A run with staleness 2 goes on synchronously: its open groups, of three steps, are those of the next one."""
    order, buffer = PromptOrder(PROMPTS, seed=0), WaitingBuffer(4, 0, BufferConfig())
    waits: dict[str, Any] = {"most_at_once": 4, "waits_for_places": False, "samples_per_prompt": 1, "greedy": False}
    producer = Producer(order, None, None, buffer, **waits, seed=0, step_timeout_seconds=1.0)  # type: ignore[arg-type]
    prompts = [prompt.id for prompt in order.take(4)]
    was_open = [{"id": f"{i:08d}", "prompt": p, "step": 3 + min(i, 2)} for i, p in enumerate(prompts)]
    producer.load_state_dict({"order": order.state_dict(), "started": 4, "open": was_open})
    assert [(r.id, r.step, r.oldest) for r in producer._requests([3] * 4)] == [(f"{i:08d}", 3, 2) for i in range(4)]


def test_times_are_of_the_step_while_later_steps_are_sampled() -> None:
    """The sampler's seconds, and when a step's groups were there, though its stream goes on with the next step's."""
    at: dict[str, float] = {}

    class Stream:
        async def places(self, responses: int) -> int:
            return 4

        async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
            first, *later = (group(request) for request in requests)
            await asyncio.sleep(0.05)
            at["first"] = time.monotonic()
            yield [first]
            await asyncio.sleep(0.2)
            yield later

    class Scores:
        async def score(self, sampled: Any) -> Scored:
            await asyncio.sleep(0.05)
            (groups,) = sampled
            return Scored([GroupScores((Score(1.0),)) for _ in groups], ScoreReport())

    def group(request: GroupRequest) -> Group:
        tokens, logprobs = np.array([1], np.int32), np.array([-1.0], np.float32)
        return Group(
            request.id, request.prompt, (Sample(0, tokens, logprobs, "", "stop", (0, 0), 0),), step=request.step
        )

    async def check() -> None:
        buffer = WaitingBuffer(1, 1, BufferConfig())
        waits: dict[str, Any] = {"most_at_once": 2, "waits_for_places": True, "samples_per_prompt": 1, "greedy": False}
        producer = Producer(
            PromptOrder(PROMPTS, seed=0), Stream(), Scores(), buffer, **waits, seed=0, step_timeout_seconds=9.0  # type: ignore[arg-type]
        )  # fmt: skip
        began = time.monotonic()
        running = asyncio.create_task(producer.run())
        (taken,) = await until(buffer.take(), running)
        assert taken.step == 1
        assert producer.sampled_at(1) == pytest.approx(at["first"], abs=0.02)
        _, seconds = producer.take_report()
        assert seconds == pytest.approx(time.monotonic() - began, abs=0.02)
        running.cancel()

    asyncio.run(check())


def test_waiting_for_groups_ends_with_the_producers_own_error() -> None:
    class RewardBroke(RuntimeError):
        pass

    async def fails() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(raise_later())

    async def raise_later() -> None:
        await asyncio.sleep(0.01)
        raise RewardBroke("the verifier is gone")

    async def wait_for_it() -> None:
        await until(asyncio.Event().wait(), asyncio.create_task(fails()))

    with pytest.raises(RewardBroke, match="the verifier is gone"):
        asyncio.run(wait_for_it())
