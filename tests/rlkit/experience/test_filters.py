"""What the buffer's filters reject, and when too much is rejected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scored_groups import make_buffer, make_group, reject

from rlkit.experience import Episode
from rlkit.experience.buffer import DataSolvedError, TooManyRejectedError
from rlkit.experience.filters import BufferConfig, make_filter, masked


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


def test_too_many_rejections_name_the_rule_and_the_share() -> None:
    buffer = make_buffer(groups_per_step=2, drop_equal_rewards=True, max_group_reward=0.6, max_rejected_share=0.7)
    for name, rewards in (("a", (1, 1)), ("b", (1, 1)), ("c", (0, 1, 1))):
        buffer.reserve(1)
        assert buffer.add(make_group(name, *rewards)) is False  # three of three, but too few to judge by
    buffer.reserve(1)
    assert buffer.take() is None
    buffer.add(make_group("d", 0, 0))
    assert buffer.reserve(1) == []
    with pytest.raises(TooManyRejectedError) as caught:
        buffer.take()
    message = str(caught.value)
    assert "4 of 4 groups" in message
    assert "buffer.drop_equal_rewards: 3" in message
    assert "buffer.max_group_reward: 1" in message
    assert "max_rejected_share=0.7" in message


def test_solved_data_are_a_good_end_and_hopeless_ones_an_error_that_says_so() -> None:
    def all_rejected(*groups: tuple[float, ...]) -> None:
        buffer = make_buffer(groups_per_step=10, drop_equal_rewards=True, max_rejected_share=0.8)
        reject(buffer, *groups)
        buffer.take()

    with pytest.raises(DataSolvedError, match=r"the data are solved: .* in 20 of them every response is right"):
        all_rejected(*[(1, 1)] * 20)
    with pytest.raises(DataSolvedError, match="in 19 of them"):
        all_rejected((0, 0), *[(1, 1)] * 19)
    with pytest.raises(
        TooManyRejectedError, match="in 20 of them every response is wrong, so nothing can be"
    ) as caught:
        all_rejected(*[(0, 0)] * 20)
    assert not isinstance(caught.value, DataSolvedError)
    with pytest.raises(TooManyRejectedError, match=r"\(all right: 10, all wrong: 10\)") as caught:
        all_rejected(*[(0, 0), (1, 1)] * 10)
    assert not isinstance(caught.value, DataSolvedError)


def test_masking_makes_truncated_samples_invalid_and_leaves_the_others() -> None:
    group = masked(make_group("a", 1.0, 0.0, finish="length"))
    assert group.valid.tolist() == [False, True]
    assert group.scored()[0][1].reason.startswith("truncated: cut at rollout.max_response_tokens")
    whole = make_group("b", 1.0, 0.0)
    assert masked(whole) is whole
    with pytest.raises(ValueError, match="set only truncated"):
        BufferConfig(drop_truncated=True, truncated="mask")


def test_an_episode_without_turns_left_is_masked_for_that() -> None:
    group = make_group("a", 1.0, 0.0, finish="length")
    samples = tuple(replace(sample, episode=Episode("turns")) for sample in group.samples)
    assert "cut at environment.max_turns" in masked(replace(group, samples=samples)).scored()[0][1].reason


def test_rejections_are_judged_per_step() -> None:
    buffer = make_buffer(groups_per_step=1, drop_equal_rewards=True, max_rejected_share=0.7)
    for step in range(5):  # one rejected, one good, step after step: never above the share
        for rewards in ((1, 1), (0, 1)):
            assert buffer.reserve(1) == [step + 1]
            buffer.add(make_group(f"{step}", *rewards, version=step, step=step + 1))
        assert buffer.take() is not None
        buffer.advance(step + 1)


def test_steps_before_the_one_that_cannot_be_filled_are_trained() -> None:
    """Groups of several steps are sampled at a time; each step's rejections count for themselves."""
    buffer = make_buffer(groups_per_step=2, max_staleness=2, drop_equal_rewards=True, max_rejected_share=0.7)
    assert buffer.reserve(9) == [1, 1, 2, 2, 3, 3]
    rejected = ((1, 1), (0, 0), (2, 2), (1, 1))
    for i, rewards in enumerate(rejected):  # all of step 2
        buffer.add(make_group(f"a{i}", *rewards, step=2))
        assert buffer.reserve(1) == ([2] if i < 3 else [])
    for name, step in (("b0", 3), ("b1", 1), ("b2", 1)):
        buffer.add(make_group(name, 0, 1, step=step))
    taken = buffer.take()
    assert taken is not None and [group.id for group in taken] == ["b1", "b2"]
    buffer.advance(1)
    assert buffer.reserve(9) == [], "for steps that are never reached"
    with pytest.raises(TooManyRejectedError, match="4 of 4 groups of one step"):
        buffer.take()
