"""The experience buffer: its state machine under every interleaving, its filters, and its actor under real Ray."""

from __future__ import annotations

import asyncio
import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ray_fixture import ray_session  # noqa: F401

from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score
from rlkit.experience.buffer import DataSolvedError, ExperienceBuffer, TooManyRejectedError, with_surplus
from rlkit.experience.buffer_actor import BufferActor
from rlkit.experience.filters import BufferConfig, make_filter, masked


def make_group(name: str, *rewards: float | None, version: int = 0, finish: str = "stop") -> Group:
    """A group with these rewards (None: invalid), sampled with the weights of `version`."""
    samples = tuple(
        Sample(
            index=i,
            token_ids=np.array([5], dtype=np.int32),
            logprobs=np.array([-1.0], dtype=np.float32),
            text="",
            finish_reason=finish if i == 0 else "stop",  # type: ignore[arg-type]
            policy_versions=(version, version),
            seed=0,
        )
        for i in range(len(rewards))
    )
    scores = tuple(Score.invalid("timeout: test") if reward is None else Score(value=reward) for reward in rewards)
    return Group(name, Prompt("p", (Message("user", "?"),), (1,)), samples).with_scores(GroupScores(scores))


def make_buffer(
    groups_per_step: int = 2, max_staleness: int = 0, oversample: float = 1.0, **filters: Any
) -> ExperienceBuffer:
    config = BufferConfig(**filters)
    rule, share = make_filter(config), config.max_rejected_share
    return ExperienceBuffer(groups_per_step, max_staleness, rule, share, oversample)


class AnyInterleaving(RuleBasedStateMachine):
    """Producers that finish in any order, fail, and sample with any weights that were current meanwhile."""

    @initialize(groups_per_step=st.integers(1, 3), max_staleness=st.integers(0, 2))
    def start(self, groups_per_step: int, max_staleness: int) -> None:
        self.n, self.s = groups_per_step, max_staleness
        self.buffer = self.fresh()
        self.version = 0
        self.flying: list[int] = []  # the policy version each reservation samples with
        self.waiting: set[str] = set()
        self.taken: list[str] = []
        self.taken_batches = 0
        self.kept = self.rejected = self.asked_again = self.reserved = 0

    def fresh(self) -> ExperienceBuffer:
        never_too_many = 1.0
        return ExperienceBuffer(self.n, self.s, make_filter(BufferConfig(drop_equal_rewards=True)), never_too_many)

    @rule(limit=st.integers(0, 8))
    def reserve(self, limit: int) -> None:
        granted = self.buffer.reserve(limit)
        assert 0 <= granted <= limit
        room_left = self.buffer.reserve(1)
        if granted < limit:
            assert room_left == 0, "less was granted than there was room for"
        self.flying += [self.version] * (granted + room_left)
        self.reserved += granted + room_left

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), good=st.booleans())
    def add(self, data: st.DataObject, good: bool) -> None:
        version = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        name = f"g{self.kept + self.rejected}"
        accepted = self.buffer.add(make_group(name, 0.0, 1.0 if good else 0.0, version=version))
        assert accepted is good
        self.kept += good
        self.rejected += not good
        if good:
            self.waiting.add(name)

    @rule(limit=st.integers(0, 8), slow=st.integers(0, 3))
    def a_step_with_slow_groups(self, limit: int, slow: int) -> None:
        """Rare as a chance sequence of the other rules: the oldest groups stay behind while the rest is trained."""
        self.reserve(limit)
        while len(self.flying) > slow:
            version = self.flying.pop()
            self.waiting.add(f"g{self.kept + self.rejected}")
            self.buffer.add(make_group(f"g{self.kept + self.rejected}", 0.0, 1.0, version=version))
            self.kept += 1
        self.take()
        if self.version < self.taken_batches:
            self.advance()

    @rule()
    def take(self) -> None:
        dropped_before = self.buffer.stats().dropped_stale
        groups = self.buffer.take()
        if groups is None:
            assert self.buffer.stats().ready < self.n
            return
        assert len(groups) == self.n
        for group in groups:
            assert self.version - group.policy_version <= self.s, "a group is older than the staleness bound"
            assert group.id in self.waiting, "a group came out twice, or never went in"
            self.waiting.remove(group.id)
            self.taken.append(group.id)
        assert self.buffer.stats().dropped_stale >= dropped_before
        self.taken_batches += 1

    @precondition(lambda self: self.version < self.taken_batches)
    @rule()
    def advance(self) -> None:
        self.version += 1
        self.buffer.advance(self.version)

    @rule()
    def save_and_resume(self) -> None:
        state = pickle.loads(pickle.dumps(self.buffer.state_dict()))
        self.buffer = self.fresh()
        self.buffer.load_state_dict(state)
        self.asked_again += len(self.flying)  # what was in flight is asked for again
        self.flying.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "buffer"):
            return
        stats = self.buffer.stats()
        assert stats.version == self.version
        assert stats.in_flight == len(self.flying)
        assert stats.ready + stats.dropped_stale + len(self.taken) == self.kept
        assert sum(stats.rejected.values()) == self.rejected
        assert self.reserved == len(self.flying) + self.kept + self.rejected + self.asked_again

    @invariant()
    def producers_are_held_back(self) -> None:
        if not hasattr(self, "buffer"):
            return
        stats = self.buffer.stats()
        outstanding = stats.ready + stats.in_flight
        assert outstanding + len(self.taken) <= (self.version + self.s + 1) * self.n

    @invariant()
    def never_stuck(self) -> None:
        """Between an update and the next take, a full step's groups are ready or somebody may produce them."""
        if not hasattr(self, "buffer") or self.taken_batches > self.version:
            return
        stats = self.buffer.stats()
        room = copy.deepcopy(self.buffer).reserve(1)
        assert stats.ready >= self.n or stats.in_flight + room > 0


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_stale_group_behind_a_fresh_one_is_dropped() -> None:
    buffer = make_buffer(groups_per_step=2, max_staleness=1)
    assert buffer.reserve(9) == 4  # one of them is scored slowly
    for version, names in ((0, ("a", "b")), (1, ("c", "d"))):
        for name in names:
            buffer.add(make_group(name, 0, 1, version=version))
        assert buffer.take() is not None
        buffer.advance(version + 1)
        assert buffer.reserve(9) == 2
    buffer.add(make_group("fresh", 0, 1, version=1))
    buffer.add(make_group("slow", 0, 1, version=0))
    buffer.add(make_group("fresh too", 0, 1, version=2))
    groups = buffer.take()
    assert groups is not None
    assert [group.id for group in groups] == ["fresh", "fresh too"]
    assert buffer.stats().dropped_stale == 1
    assert buffer.reserve(9) == 1, "the dropped group's place is not free again"


def test_oldest_version_of_any_token_decides_staleness() -> None:
    buffer = make_buffer(groups_per_step=1, max_staleness=1)
    buffer.reserve(1)
    for version in (1, 2):
        buffer.advance(version)
    group = make_group("mixed", 0, 1, version=2)
    old = replace(group.samples[1], policy_versions=(0, 2))
    buffer.add(replace(group, samples=(group.samples[0], old)))
    assert buffer.take() is None
    assert buffer.stats().dropped_stale == 1


def test_synchronous_training_never_samples_ahead() -> None:
    buffer = make_buffer(groups_per_step=3, max_staleness=0)
    assert buffer.reserve(10) == 3
    for i in range(3):
        buffer.add(make_group(f"{i}", 0, 1))
    assert buffer.take() is not None
    assert buffer.reserve(10) == 0, "sampled with weights that are about to be replaced"
    buffer.advance(1)
    assert buffer.reserve(10) == 3


def test_versions_follow_one_another_and_reservations_are_counted() -> None:
    buffer = make_buffer()
    with pytest.raises(ValueError, match="version 2 cannot follow"):
        buffer.advance(2)
    buffer.reserve(1)
    buffer.add(make_group("a", 0, 1))
    with pytest.raises(ValueError, match="none is in flight"):
        buffer.add(make_group("b", 0, 1))


@pytest.mark.parametrize(
    ("rules", "rewards", "finish", "verdict"),
    [
        ({}, (0, 0), "length", None),
        ({"drop_equal_rewards": True}, (1, 1), "stop", "drop_equal_rewards"),
        ({"drop_equal_rewards": True}, (0, 1), "stop", None),
        ({"drop_equal_rewards": True}, (1, None, 1), "stop", "drop_equal_rewards"),
        ({"drop_equal_rewards": True}, (None, None), "stop", None),
        ({"min_group_reward": 0.5}, (0, 1, None), "stop", None),
        ({"min_group_reward": 0.5}, (0, 0, 1, None), "stop", "min_group_reward"),
        ({"min_group_reward": 0.5}, (None, None), "stop", None),
        ({"max_group_reward": 0.5}, (0, 1), "stop", None),
        ({"max_group_reward": 0.5}, (0, 1, 1), "stop", "max_group_reward"),
        ({"drop_truncated": True}, (0, 1), "length", "truncated"),
        ({"drop_truncated": True}, (None, None), "length", "truncated"),
        ({"drop_truncated": True}, (0, 1), "stop", None),
        ({"truncated": "drop_group"}, (0, 1), "length", "truncated"),
        ({"truncated": "mask"}, (0, 1), "length", None),
    ],
)
def test_filters(rules: dict[str, Any], rewards: tuple[float | None, ...], finish: str, verdict: str | None) -> None:
    rejected_by = make_filter(BufferConfig(**rules))
    assert rejected_by(make_group("g", *rewards, finish=finish)) == verdict


def test_rejected_groups_make_room_for_others() -> None:
    buffer = make_buffer(groups_per_step=2, drop_equal_rewards=True)
    assert buffer.reserve(9) == 2
    assert buffer.add(make_group("equal", 1, 1)) is False
    assert buffer.add(make_group("good", 0, 1)) is True
    assert buffer.reserve(9) == 1
    assert buffer.take() is None
    buffer.add(make_group("second", 0, 1))
    groups = buffer.take()
    assert groups is not None
    assert [group.id for group in groups] == ["good", "second"]
    assert buffer.stats().rejected == {"drop_equal_rewards": 1}


def test_too_many_rejections_name_the_rule_and_the_share() -> None:
    buffer = make_buffer(groups_per_step=2, drop_equal_rewards=True, max_group_reward=0.6, max_rejected_share=0.7)
    for name, rewards in (("a", (1, 1)), ("b", (1, 1)), ("c", (0, 1, 1))):
        buffer.reserve(1)
        assert buffer.add(make_group(name, *rewards)) is False  # three of three, but too few to judge by
    buffer.reserve(1)
    with pytest.raises(TooManyRejectedError) as caught:
        buffer.add(make_group("d", 0, 0))
    message = str(caught.value)
    assert "4 of 4 groups" in message
    assert "buffer.drop_equal_rewards: 3" in message
    assert "buffer.max_group_reward: 1" in message
    assert "max_rejected_share=0.7" in message


def reject(buffer: ExperienceBuffer, *groups: tuple[float, ...]) -> None:
    for i, rewards in enumerate(groups):
        buffer.reserve(1)
        buffer.add(make_group(f"{i}", *rewards))


def test_solved_data_are_a_good_end_and_hopeless_ones_an_error_that_says_so() -> None:
    options: dict[str, Any] = {"groups_per_step": 10, "drop_equal_rewards": True, "max_rejected_share": 0.8}
    with pytest.raises(DataSolvedError, match=r"the data are solved: .* in 20 of them every response is right"):
        reject(make_buffer(**options), *[(1, 1)] * 20)
    with pytest.raises(DataSolvedError, match="in 19 of them"):
        reject(make_buffer(**options), (0, 0), *[(1, 1)] * 19)
    with pytest.raises(
        TooManyRejectedError, match="in 20 of them every response is wrong, so nothing can be"
    ) as caught:
        reject(make_buffer(**options), *[(0, 0)] * 20)
    assert not isinstance(caught.value, DataSolvedError)
    with pytest.raises(TooManyRejectedError, match=r"\(all right: 10, all wrong: 10\)") as caught:
        reject(make_buffer(**options), *[(0, 0), (1, 1)] * 10)
    assert not isinstance(caught.value, DataSolvedError)


def test_rejected_groups_are_kept_for_the_metrics_of_their_step() -> None:
    buffer = make_buffer(groups_per_step=4, drop_equal_rewards=True)
    reject(buffer, (1, 1), (0, 0), (0, 1))
    assert [group.id for group in buffer.take_rejected()] == ["0", "1"]
    assert buffer.take_rejected() == []
    assert buffer.stats().verdicts == {"all_right": 1, "all_wrong": 1}


def test_masking_makes_truncated_samples_invalid_and_leaves_the_others() -> None:
    group = masked(make_group("a", 1.0, 0.0, finish="length"))
    assert group.valid.tolist() == [False, True]
    assert group.scored()[0][1].reason.startswith("truncated: ")
    whole = make_group("b", 1.0, 0.0)
    assert masked(whole) is whole
    with pytest.raises(ValueError, match="set truncated alone"):
        BufferConfig(drop_truncated=True, truncated="mask")


def test_a_step_that_began_can_be_undone_and_its_groups_asked_for_again() -> None:
    buffer = make_buffer(groups_per_step=2)
    reject(buffer, (0, 1), (0, 1))
    taken = buffer.take()
    assert taken is not None
    buffer.advance(1)
    assert buffer.reserve(9) == 2
    for name in ("2", "3"):
        buffer.add(make_group(name, 0, 1, version=1))
    assert buffer.take() is not None
    assert buffer.put_back() == [("2", "p"), ("3", "p")]
    assert (buffer.stats().version, buffer.reserve(9)) == (0, 0)
    buffer.advance(1)
    assert buffer.reserve(9) == 2


@pytest.mark.parametrize(("groups", "share", "expected"), [(32, 1.25, 40), (10, 1.1, 11), (3, 1.1, 4), (7, 1.0, 7)])
def test_a_surplus_is_rounded_up(groups: int, share: float, expected: int) -> None:
    assert with_surplus(groups, share) == expected


def test_of_more_groups_than_a_step_takes_those_asked_for_first_are_trained() -> None:
    buffer = make_buffer(groups_per_step=4, oversample=1.5, drop_equal_rewards=True)
    assert buffer.reserve(9) == 6
    for name in "fedc":
        buffer.add(make_group(name, 0, 1))
    assert buffer.take() is None, "who was scored first decided"
    buffer.add(make_group("b", 1, 1))
    buffer.add(make_group("a", 0, 1))
    groups = buffer.take()
    assert groups is not None
    assert [group.id for group in groups] == ["a", "c", "d", "e"]
    assert [group.id for group in buffer.take_rejected()] == ["b", "f"]  # metrics are of all judged groups
    assert buffer.stats().surplus == 1
    assert buffer.reserve(9) == 0
    buffer.advance(1)
    assert buffer.reserve(9) == 6


def test_a_second_round_asks_for_what_is_lacking_and_its_surplus() -> None:
    buffer = make_buffer(groups_per_step=4, oversample=1.5, drop_equal_rewards=True)
    buffer.reserve(9)
    for name, rewards in zip("abcdef", [(0, 0)] * 4 + [(0, 1)] * 2, strict=True):
        buffer.add(make_group(name, *rewards))
    assert buffer.take() is None
    assert buffer.reserve(9) == 3


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
        count = self.buffer.reserve(len(self.again) or with_surplus(3, 1.7))
        repeated, self.again = self.again[:count], self.again[count:]
        new = range(self.started, self.started + count - len(repeated))
        self.started += len(new)
        self.flying = [*repeated, *new]

    def add(self, version: int) -> None:
        number = self.flying.pop(self.rng.integers(len(self.flying)))
        good = number * 7919 % 11 < 6  # whether a group differs in itself is its own affair
        self.buffer.add(make_group(f"{number:03d}", 0.0, float(good), version=version))

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


def test_rejections_are_judged_per_step() -> None:
    buffer = make_buffer(groups_per_step=1, drop_equal_rewards=True, max_rejected_share=0.7)
    for step in range(5):  # one rejected, one good, step after step: never above the share
        for rewards in ((1, 1), (0, 1)):
            assert buffer.reserve(1) == 1
            buffer.add(make_group(f"{step}", *rewards, version=step))
        assert buffer.take() is not None
        buffer.advance(step + 1)


def test_state_survives_and_what_was_in_flight_is_asked_for_again() -> None:
    buffer = make_buffer(groups_per_step=2, max_staleness=1, drop_equal_rewards=True)
    assert buffer.reserve(9) == 4
    buffer.add(make_group("equal", 1, 1))
    buffer.add(make_group("kept", 0, 1))
    resumed = make_buffer(groups_per_step=2, max_staleness=1, drop_equal_rewards=True)
    resumed.load_state_dict(pickle.loads(pickle.dumps(buffer.state_dict())))
    assert resumed.stats() == replace(buffer.stats(), in_flight=0)
    assert resumed.reserve(9) == 3
    resumed.add(make_group("next", 0, 1))
    groups = resumed.take()
    assert groups is not None
    assert [group.id for group in groups] == ["kept", "next"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_actor_wakes_whoever_waits_and_hands_failures_on() -> None:
    import ray

    async def check() -> None:
        config = BufferConfig(drop_equal_rewards=True, max_rejected_share=0.5)
        buffer = ray.remote(num_cpus=0)(BufferActor).remote(2, 0, config)
        taker = asyncio.ensure_future(buffer.take.remote())
        assert await buffer.reserve.remote(5) == 2
        blocked = asyncio.ensure_future(buffer.reserve.remote(5))
        await buffer.add.remote([make_group("a", 0, 1)])
        assert not (await asyncio.wait({taker, blocked}, timeout=0.3))[0], "answered with one group of two"
        await buffer.add.remote([make_group("b", 0, 1)])
        assert [group.id for group in await asyncio.wait_for(taker, 20)] == ["a", "b"]
        assert not (await asyncio.wait({blocked}, timeout=0.3))[0], "room before the new weights"
        await buffer.advance.remote(1)
        assert await asyncio.wait_for(blocked, 20) == 2

        taker = asyncio.ensure_future(buffer.take.remote())
        blocked = asyncio.ensure_future(buffer.reserve.remote(2))
        await buffer.add.remote([make_group("c", 1, 1, version=1)])
        assert not (await asyncio.wait({taker, blocked}, timeout=0.3))[0], "room in the middle of a round"
        await buffer.add.remote([make_group("d", 0, 0, version=1)])
        assert await asyncio.wait_for(blocked, 20) == 2
        work = buffer.add.remote([make_group("e", 1, 1, version=1), make_group("f", 0, 0, version=1)])
        with pytest.raises(TooManyRejectedError, match="drop_equal_rewards: 4"):
            await asyncio.wait_for(work, 20)
        with pytest.raises(TooManyRejectedError, match="drop_equal_rewards: 4"):
            await asyncio.wait_for(taker, 20)
        ray.kill(buffer)

    asyncio.run(check())
