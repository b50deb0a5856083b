"""The experience buffer: its state machine under every interleaving, and its actor under real Ray."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ray_fixture import ray_session  # noqa: F401
from scored_groups import make_buffer, make_group, reject

from rlkit.experience import Group
from rlkit.experience.buffer import ExperienceBuffer, TooManyRejectedError, with_surplus
from rlkit.experience.filters import BufferConfig, make_filter
from rlkit.experience.waiting_buffer import WaitingBuffer


def names(groups: Sequence[Group] | None) -> list[str]:
    assert groups is not None
    return [group.id for group in groups]


class AnyInterleaving(RuleBasedStateMachine):
    """Producers that finish in any order, fail, are killed, and sample with any weights that were current."""

    @initialize(groups_per_step=st.integers(1, 3), max_staleness=st.integers(0, 3), last_step=st.integers(1, 9))
    def start(self, groups_per_step: int, max_staleness: int, last_step: int) -> None:
        self.n, self.s, self.last_step = groups_per_step, max_staleness, last_step
        self.buffer = self.fresh()
        self.version = 0
        self.flying: list[tuple[str, int, int]] = []  # name, step, the version it began with
        self.lost: list[tuple[str, int]] = []  # by a kill: asked for again, for the same step
        self.waiting: set[str] = set()
        self.trained: list[str] = []
        self.steps = 0
        self.started = self.rejected = 0

    def fresh(self) -> ExperienceBuffer:
        never_too_many = 1.0
        rejected_by = make_filter(BufferConfig(drop_equal_rewards=True))
        return ExperienceBuffer(self.n, self.s, rejected_by, never_too_many, last_step=self.last_step)

    @rule(limit=st.integers(0, 8))
    def reserve(self, limit: int) -> None:
        places = self.buffer.reserve(limit)
        assert len(places) <= limit
        assert places == sorted(places), "a later step is served before an earlier one"
        assert max(places, default=0) <= self.last_step, "this will not be trained"
        if len(places) < limit:
            assert not self.buffer.reserve(1), "less was granted than there was room for"
        for step in places:
            again = next(((name, lost) for name, lost in self.lost if lost == step), None)
            if again is not None:
                self.lost.remove(again)
                self.flying.append((again[0], step, self.version))
            else:
                self.flying.append((f"{self.started:04d}", step, self.version))
                self.started += 1

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), good=st.booleans())
    def add(self, data: st.DataObject, good: bool) -> None:
        name, step, version = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        group = make_group(name, 0.0, 1.0 if good else 0.0, version=version, step=step)
        assert self.buffer.add(group) is good
        self.rejected += not good
        if good:
            self.waiting.add(name)

    @rule(limit=st.integers(0, 8), slow=st.integers(0, 3))
    def a_step_with_slow_groups(self, limit: int, slow: int) -> None:
        """Rare as a chance sequence of the other rules: the oldest groups stay behind while the rest is scored."""
        self.reserve(limit)
        while len(self.flying) > slow:
            name, step, version = self.flying.pop()
            self.waiting.add(name)
            self.buffer.add(make_group(name, 0.0, 1.0, version=version, step=step))
        self.take()
        if self.version < self.steps:
            self.advance()

    @rule()
    def take(self) -> None:
        groups = self.buffer.take()
        if groups is None:
            return
        self.steps += 1
        assert self.steps == self.version + 1, "a step was trained twice, or before its weights"
        assert len(groups) == self.n
        assert [group.id for group in groups] == sorted(group.id for group in groups)
        for group in groups:
            assert group.step == self.steps
            oldest = min(sample.policy_versions[0] for sample in group.samples)
            assert self.version - oldest <= self.s, "a group is older than the staleness bound"
            self.waiting.remove(group.id)  # came out twice, or never went in
            self.trained.append(group.id)

    @precondition(lambda self: self.version < self.steps)
    @rule()
    def advance(self) -> None:
        self.version += 1
        self.buffer.advance(self.version)

    @rule()
    def save_and_resume(self) -> None:
        state = pickle.loads(pickle.dumps(self.buffer.state_dict()))
        self.buffer = self.fresh()
        self.buffer.load_state_dict(state)
        self.lost += [(name, step) for name, step, _ in self.flying]
        self.flying.clear()
        if self.steps > self.version:  # saved after a step was trained: a resumed run begins the next one first
            self.advance()

    @precondition(lambda self: self.version)
    @rule()
    def an_end_in_a_step(self) -> None:
        """It is undone for a checkpoint, whether its groups were taken or not, and begins anew."""
        undone = self.trained[-self.n :] if self.steps > self.version else []
        assert [name for name, _ in self.buffer.put_back()] == undone
        self.lost += [(name, self.version + 1) for name in undone]
        self.trained = self.trained[: len(self.trained) - len(undone)]
        self.steps = self.version
        self.save_and_resume()
        self.buffer.advance(self.version)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "buffer"):
            return
        stats = self.buffer.stats()
        assert stats.version == self.version
        assert (stats.ready, stats.in_flight) == (len(self.waiting), len(self.flying))
        assert sum(stats.rejected.values()) == self.rejected
        assert self.started == sum(map(len, (self.trained, self.waiting, self.flying, self.lost))) + self.rejected

    @invariant()
    def never_stuck(self) -> None:
        """A step's groups are there, or somebody makes them, or there is room for who does."""
        if not hasattr(self, "buffer") or self.steps > self.version or self.steps == self.last_step:
            return
        buffer = copy.deepcopy(self.buffer)
        flying = [step for _, step, _ in self.flying]
        places = flying.count(self.version + 1) + buffer.reserve(100).count(self.version + 1)
        ready = buffer.take()
        assert ready is not None or places > 0


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_slow_group_is_waited_for_and_nothing_is_dropped() -> None:
    buffer = make_buffer(groups_per_step=2, max_staleness=1)
    assert buffer.reserve(9) == [1, 1, 2, 2]
    for name, step in (("0", 1), ("2", 2), ("3", 2)):
        buffer.add(make_group(name, 0, 1, step=step))
    assert buffer.take() is None, "a fast group took the place of a slow one"
    buffer.add(make_group("1", 0, 1, step=1))
    assert names(buffer.take()) == ["0", "1"]
    assert buffer.reserve(9) == []
    buffer.advance(1)
    assert buffer.reserve(9) == [3, 3]
    assert names(buffer.take()) == ["2", "3"]


def test_a_replacement_comes_before_what_is_for_later_steps() -> None:
    buffer = make_buffer(groups_per_step=2, max_staleness=2, drop_equal_rewards=True)
    assert buffer.reserve(3) == [1, 1, 2]
    buffer.add(make_group("0", 1, 1, step=1))
    assert buffer.reserve(2) == [1, 2]


def test_nothing_is_sampled_that_will_not_be_trained() -> None:
    buffer = make_buffer(groups_per_step=2, max_staleness=2, last_step=2)
    assert buffer.reserve(9) == [1, 1, 2, 2]
    for name, step in (("0", 1), ("1", 1), ("2", 2), ("3", 2)):
        buffer.add(make_group(name, 0, 1, step=step))
    assert names(buffer.take()) == ["0", "1"]
    buffer.advance(1)
    assert buffer.reserve(9) == []
    assert names(buffer.take()) == ["2", "3"]


def test_synchronous_training_never_samples_ahead() -> None:
    buffer = make_buffer(groups_per_step=3, max_staleness=0)
    assert buffer.reserve(10) == [1, 1, 1]
    for i in range(3):
        buffer.add(make_group(f"{i}", 0, 1))
    assert buffer.take() is not None
    assert buffer.reserve(10) == [], "sampled with weights that are about to be replaced"
    buffer.advance(1)
    assert buffer.reserve(10) == [2, 2, 2]


def test_versions_follow_one_another_and_reservations_are_counted() -> None:
    buffer = make_buffer()
    with pytest.raises(ValueError, match="version 2 cannot follow"):
        buffer.advance(2)
    buffer.reserve(1)
    buffer.add(make_group("a", 0, 1))
    with pytest.raises(ValueError, match="group b was handed in for step 1, which has none in flight"):
        buffer.add(make_group("b", 0, 1))


def test_rejected_groups_make_room_for_others() -> None:
    buffer = make_buffer(groups_per_step=2, drop_equal_rewards=True)
    assert buffer.reserve(9) == [1, 1]
    assert buffer.add(make_group("equal", 1, 1)) is False
    assert buffer.add(make_group("good", 0, 1)) is True
    assert buffer.reserve(9) == [1]
    assert buffer.take() is None
    buffer.add(make_group("second", 0, 1))
    assert names(buffer.take()) == ["good", "second"]
    assert buffer.stats().rejected == {"drop_equal_rewards": 1}


def test_rejected_groups_are_kept_for_the_metrics_of_their_step() -> None:
    buffer = make_buffer(groups_per_step=4, drop_equal_rewards=True)
    reject(buffer, (1, 1), (0, 0), (0, 1))
    assert [group.id for group in buffer.take_rejected()] == ["0", "1"]
    assert buffer.take_rejected() == []
    assert buffer.stats().verdicts == {"all_right": 1, "all_wrong": 1}


def test_a_step_that_began_can_be_undone_and_its_groups_asked_for_again() -> None:
    buffer = make_buffer(groups_per_step=2)
    reject(buffer, (0, 1), (0, 1))
    taken = buffer.take()
    assert taken is not None
    buffer.advance(1)
    assert buffer.reserve(9) == [2, 2]
    for name in ("2", "3"):
        buffer.add(make_group(name, 0, 1, version=1, step=2))
    assert buffer.take() is not None
    assert buffer.put_back() == [("2", "p"), ("3", "p")]
    assert (buffer.stats().version, buffer.reserve(9)) == (0, [])
    buffer.advance(1)
    assert buffer.reserve(9) == [2, 2]


@pytest.mark.parametrize(("groups", "share", "expected"), [(32, 1.25, 40), (10, 1.1, 11), (3, 1.1, 4), (7, 1.0, 7)])
def test_a_surplus_is_rounded_up(groups: int, share: float, expected: int) -> None:
    assert with_surplus(groups, share) == expected


def test_of_more_groups_than_a_step_takes_those_asked_for_first_are_trained() -> None:
    buffer = make_buffer(groups_per_step=4, oversample=1.5, drop_equal_rewards=True)
    assert buffer.reserve(9) == [1] * 6
    for name in "fedc":
        buffer.add(make_group(name, 0, 1))
    assert buffer.take() is None, "who was scored first decided"
    buffer.add(make_group("b", 1, 1))
    buffer.add(make_group("a", 0, 1))
    assert names(buffer.take()) == ["a", "c", "d", "e"]
    assert [group.id for group in buffer.take_rejected()] == ["b", "f"]  # metrics are of all judged groups
    assert buffer.stats().surplus == 1
    assert buffer.reserve(9) == []
    buffer.advance(1)
    assert buffer.reserve(9) == [2] * 6


def test_a_second_round_asks_for_what_is_lacking_and_its_surplus() -> None:
    buffer = make_buffer(groups_per_step=4, oversample=1.5, drop_equal_rewards=True)
    buffer.reserve(9)
    for name, rewards in zip("abcdef", [(0, 0)] * 4 + [(0, 1)] * 2, strict=True):
        buffer.add(make_group(name, *rewards))
    assert buffer.take() is None
    assert buffer.reserve(9) == [1] * 3


class Step:
    """A producer and a trainer of one step after the other, with groups that come in any order."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.started = rng, 0
        self.buffer = make_buffer(3, oversample=1.7, drop_equal_rewards=True, max_rejected_share=0.99)
        self.again: list[int] = []
        self.flying: list[int] = []

    def reserve(self) -> None:
        if self.flying:
            return  # a round is judged whole
        count = len(self.buffer.reserve(len(self.again) or with_surplus(3, 1.7)))
        repeated, self.again = self.again[:count], self.again[count:]
        new = range(self.started, self.started + count - len(repeated))
        self.started += len(new)
        self.flying = [*repeated, *new]

    def add(self, version: int) -> None:
        number = self.flying.pop(self.rng.integers(len(self.flying)))
        good = number * 7919 % 11 < 6  # whether a group differs in itself is its own affair
        self.buffer.add(make_group(f"{number:03d}", 0.0, float(good), version=version, step=version + 1))

    def interrupt(self) -> None:
        """An end in the middle of a step, and a resume."""
        version = self.buffer.stats().version
        self.again += [int(name) for name, _ in self.buffer.put_back()] + self.flying
        self.flying = []
        state = pickle.loads(pickle.dumps(self.buffer.state_dict()))
        self.buffer = make_buffer(3, oversample=1.7, drop_equal_rewards=True, max_rejected_share=0.99)
        self.buffer.load_state_dict(state)
        self.buffer.advance(version)


def trained(seed: int, interrupted: float) -> list[list[str]]:
    step = Step(np.random.default_rng(seed))
    steps: list[list[str]] = []
    for version in range(6):
        if version:
            step.buffer.advance(version)
        groups = None
        while groups is None:
            step.reserve()
            if step.flying:
                step.add(version)
            groups = step.buffer.take()
            if version and step.rng.random() < interrupted:
                step.interrupt()
                groups = None
        steps.append([group.id for group in groups])
    return [*steps, [str(step.started)]]


def test_what_is_trained_depends_neither_on_order_nor_on_interruptions() -> None:
    expected = trained(0, interrupted=0.0)
    for seed in range(40):
        assert trained(seed, interrupted=0.0) == expected
        assert trained(seed, interrupted=0.1) == expected


def test_state_survives_and_what_was_in_flight_is_asked_for_again() -> None:
    buffer = make_buffer(groups_per_step=2, max_staleness=1, drop_equal_rewards=True)
    assert buffer.reserve(9) == [1, 1, 2, 2]
    buffer.add(make_group("equal", 1, 1, step=1))
    buffer.add(make_group("kept", 0, 1, step=2))
    resumed = make_buffer(groups_per_step=2, max_staleness=1, drop_equal_rewards=True)
    resumed.load_state_dict(pickle.loads(pickle.dumps(buffer.state_dict())))
    assert resumed.stats() == replace(buffer.stats(), in_flight=0)
    assert resumed.reserve(9) == [1, 1, 2]


def test_a_state_without_steps_is_read() -> None:
    """As written before places belonged to steps: the groups that are ready follow the step that was trained."""
    groups = [make_group(name, 0, 1, version=1, step=9) for name in "abc"]
    buffer = make_buffer(groups_per_step=2, max_staleness=2)
    old = {"ready": groups, "accepted": 7, "version": 1, "dropped_stale": 0, "rejected": {}}
    buffer.load_state_dict(old)
    buffer.advance(2)
    assert names(buffer.take()) == ["a", "b"]
    buffer.advance(3)
    assert buffer.reserve(1) == [4]


def test_whoever_waits_is_woken_and_hears_of_failures() -> None:
    async def check() -> None:
        config = BufferConfig(drop_equal_rewards=True, max_rejected_share=0.5)
        buffer = WaitingBuffer(2, 0, config)
        taker = asyncio.ensure_future(buffer.take())
        assert await buffer.reserve(5) == [1, 1]
        blocked = asyncio.ensure_future(buffer.reserve(5))
        await buffer.add([make_group("a", 0, 1)])
        assert not (await asyncio.wait({taker, blocked}, timeout=0.3))[0], "answered with one group of two"
        await buffer.add([make_group("b", 0, 1)])
        assert [group.id for group in await asyncio.wait_for(taker, 20)] == ["a", "b"]
        assert not (await asyncio.wait({blocked}, timeout=0.3))[0], "room before the new weights"
        await buffer.advance(1)
        assert await asyncio.wait_for(blocked, 20) == [2, 2]

        taker = asyncio.ensure_future(buffer.take())
        blocked = asyncio.ensure_future(buffer.reserve(2))
        await buffer.add([make_group("c", 1, 1, version=1, step=2)])
        assert not (await asyncio.wait({taker, blocked}, timeout=0.3))[0], "room in the middle of a round"
        await buffer.add([make_group("d", 0, 0, version=1, step=2)])
        assert await asyncio.wait_for(blocked, 20) == [2, 2]
        await buffer.add([make_group(name, 1, 1, version=1, step=2) for name in "ef"])
        with pytest.raises(TooManyRejectedError, match="drop_equal_rewards: 4"):
            await asyncio.wait_for(taker, 20)

    asyncio.run(check())
