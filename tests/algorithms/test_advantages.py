"""Baselines, returns, whitening, KL in the reward and step credit, against plain loops written from the papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.functional.advantages import group_relative, leave_one_out, overlong_penalty, spread
from algorithms.functional.estimators import against_greedy, against_reference
from algorithms.functional.kl import (
    AdaptiveCoefficient,
    penalise,
    penalise_samples,
    token_kl,
)
from algorithms.functional.returns import gae, on_last_token, reinforce_plus_plus, reward_to_go, whiten
from algorithms.functional.step_credit import (
    Steps,
    clip,
    delta,
    min_form,
    soft_min_rewards,
)

REWARDS = np.array([1.0, 0.0, 4.0, 2.0, 2.0, 2.0, 7.0])
GROUP = np.array([5, 5, 5, 3, 3, 3, 9])


def booleans(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.bool_)


def ragged(seed: int = 0, samples: int = 6, gaps: bool = True) -> tuple[list[Any], list[Any], list[Any]]:
    """Rewards, values and masks of a few samples; one has no trained token if there are gaps."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, samples)
    masks = [rng.random(n) < (0.6 if gaps else 2.0) for n in lengths]
    if gaps:
        masks[0][:] = False
    return [rng.normal(size=n) for n in lengths], [rng.normal(size=n) for n in lengths], masks


# -- baselines ---------------------------------------------------------------------------------------------


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    advantages, keep = leave_one_out(REWARDS, np.ones(7, dtype=np.bool_), GROUP)
    np.testing.assert_allclose(advantages[:3], [1 - 2, 0 - 2.5, 4 - 0.5], atol=1e-12)
    assert advantages[3:].tolist() == [0.0] * 4  # all equal: exactly 0; alone in its group: 0
    assert keep.tolist() == [True] * 6 + [False]


@settings(deadline=None)
@given(st.integers(0, 1000), st.permutations(range(10)))
def test_leave_one_out_by_loops_in_any_order_with_invalid_samples(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rewards, group = rng.normal(size=10), rng.integers(0, 4, 10)
    valid = rng.random(10) < 0.8
    rewards[~valid] = math.nan
    expected, kept = np.zeros(10), np.zeros(10, dtype=np.bool_)
    for i in range(10):
        others = [rewards[j] for j in range(10) if j != i and group[j] == group[i] and valid[j]]
        if valid[i] and others:
            expected[i], kept[i] = rewards[i] - sum(others) / len(others), True
    advantages, keep = leave_one_out(rewards[order], valid[order], group[order])
    np.testing.assert_allclose(advantages, expected[order], atol=1e-12)
    assert (keep == kept[order]).all()


def test_greedy_baseline_needs_no_group() -> None:
    rewards, greedy = np.array([1.0, 0.0, math.nan, 3.0]), np.array([0.5, 1.0, 2.0, math.nan])
    advantages, keep = against_greedy(rewards, booleans(1, 1, 0, 1), greedy, booleans(1, 1, 1, 0))
    assert advantages.tolist() == [0.5, -1.0, 0.0, 0.0]
    assert keep.tolist() == [True, True, False, False]


def test_judge_against_a_reference_sample() -> None:
    four, group = booleans(1, 0, 0, 1), np.zeros(4, dtype=np.int64)  # the reference's own verdict does not count
    advantages, keep = against_reference(four, booleans(0, 1, 0, 0), np.ones(4, dtype=np.bool_), group)
    assert advantages.tolist() == [1.0, 0.0, -1.0, 1.0]
    assert keep.all()
    eight = booleans(1, 0, 1, 1, 1, 1, 0, 1)  # sum 5 of 8: skew 0.625
    reference, group = booleans(0, 1, *[0] * 6), np.zeros(8, dtype=np.int64)
    advantages, keep = against_reference(eight, reference, np.ones(8, dtype=np.bool_), group)
    assert not keep.any() and not advantages.any()
    _, keep = against_reference(eight, reference, np.ones(8, dtype=np.bool_), group, max_skew=0.625)
    assert keep.all()


def test_judge_with_invalid_and_ambiguous_references() -> None:
    wins, group = booleans(1, 0, 1, 0), np.array([1, 1, 2, 2])
    _, keep = against_reference(wins, booleans(1, 0, 1, 0), booleans(0, 1, 1, 1), group)
    assert keep.tolist() == [False, False, True, True]  # the first group's reference is invalid
    _, keep = against_reference(wins, booleans(0, 0, 1, 0), np.ones(4, dtype=np.bool_), group)
    assert keep.tolist() == [False, False, True, True]  # the first group has none
    with pytest.raises(ValueError, match="group 2 has 2 reference samples"):
        against_reference(wins, booleans(0, 0, 1, 1), np.ones(4, dtype=np.bool_), group)


def test_overlong_penalty() -> None:
    lengths = np.array([10, 12, 14, 16, 20, 25])
    expected = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    np.testing.assert_allclose(overlong_penalty(lengths, max_tokens=20, buffer_tokens=8), expected, atol=1e-12)


# -- returns -----------------------------------------------------------------------------------------------


def gae_by_hand(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, from the end; a gap's rewards go to the trained token before it."""
    advantages, returns = np.zeros(len(mask)), np.zeros(len(mask))
    pending, next_value, next_advantage = 0.0, 0.0, 0.0
    for t in reversed(range(len(mask))):
        if not mask[t]:
            pending += rewards[t]
            continue
        delta = rewards[t] + pending + gamma * next_value - values[t]
        advantages[t] = next_advantage = delta + gamma * lam * next_advantage
        returns[t] = advantages[t] + values[t]
        pending, next_value = 0.0, values[t]
    return advantages, returns


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
def test_gae(gamma: float, lam: float, gaps: bool) -> None:
    for seed in range(5):
        rewards, values, masks = ragged(seed, gaps=gaps)
        credit = gae(rewards, values, masks, gamma=gamma, lam=lam)
        for i, (r, v, m) in enumerate(zip(rewards, values, masks, strict=True)):
            advantages, returns = gae_by_hand(r, v, m, gamma, lam)
            np.testing.assert_allclose(credit.advantages[i], advantages, atol=1e-12)
            np.testing.assert_allclose(credit.returns[i], returns, atol=1e-12)


def test_a_gap_is_bridged() -> None:
    """What a tool says between two actions changes nothing, however long it is."""
    rewards, values = np.array([0.0, 1.0]), np.array([0.3, 0.6])
    plain = gae([rewards], [values], [booleans(1, 1)], gamma=0.9, lam=0.7)
    gap = np.array([0.0, 0.0, 0.0, 1.0]), np.array([0.3, 99.0, math.nan, 0.6]), booleans(1, 0, 0, 1)
    bridged = gae(*([part] for part in gap), gamma=0.9, lam=0.7)
    np.testing.assert_allclose(bridged.advantages[0][[0, 3]], plain.advantages[0], atol=1e-12)
    assert bridged.advantages[0][[1, 2]].tolist() == [0.0, 0.0]
    inside = reward_to_go([np.array([5.0, 0.0, 2.0, 0.0])], [booleans(0, 1, 0, 1)], 0.5)
    assert inside[0].tolist() == [0.0, 2.0, 0.0, 0.0]  # earned by the action before; nobody earned the 5


def test_reward_to_go_and_placement() -> None:
    masks = [booleans(1, 1, 1, 0), booleans(0, 0)]
    assert [row.tolist() for row in on_last_token(np.array([2.0, 9.0]), masks)] == [[0, 0, 2, 0], [0, 0]]
    assert [row.tolist() for row in spread(np.array([2.0, 9.0]), masks)] == [[2, 2, 2, 0], [0, 0]]
    rewards = [np.array([1.0, 0, 2, 4]), np.array([3.0, 3.0])]
    assert [row.tolist() for row in reward_to_go(rewards, masks, 0.5)] == [[2.5, 3, 6, 0], [0, 0]]


def test_whitening() -> None:
    values, _, masks = ragged(3)
    keep = np.ones(len(values), dtype=np.bool_)
    keep[2] = False
    flat = np.concatenate([v[m] for v, m, k in zip(values, masks, keep, strict=True) if k])
    result = whiten(values, masks, keep)
    expected = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    got = np.concatenate([v[m] for v, m, k in zip(result.tokens, masks, keep, strict=True) if k])
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert (result.mean, result.variance) == (flat.mean(), flat.var(ddof=1))
    assert not result.tokens[2].any() and not result.tokens[0].any()


@pytest.mark.parametrize("values", [[[0.1, 0.1], [0.1]], [[4.0], []], [[], []]])
def test_whitening_without_spread_is_exactly_zero(values: Any) -> None:
    rows = [np.array(row) for row in values]
    result = whiten(rows, [np.ones(len(row), dtype=np.bool_) for row in rows], np.ones(2, dtype=np.bool_))
    assert not np.concatenate(result.tokens).any()


@settings(deadline=None)
@given(st.permutations(range(6)), st.integers(0, 20), st.sampled_from([1.0, 0.9]))
def test_reinforce_plus_plus_in_any_order(order: list[int], seed: int, gamma: float) -> None:
    rewards, _, masks = ragged(seed)
    keep = np.array([True] * 5 + [False])
    expected = reinforce_plus_plus(rewards, masks, keep, gamma=gamma).tokens
    got = reinforce_plus_plus([rewards[i] for i in order], [masks[i] for i in order], keep[order], gamma=gamma).tokens
    for i, row in zip(order, got, strict=True):
        np.testing.assert_allclose(row, expected[i], atol=1e-9)


def test_reinforce_plus_plus_by_hand() -> None:
    """Two samples, KL 0.1 and 0.3 per token, coefficient 0.5, outcome on the last token."""
    masks = [booleans(1, 1), booleans(1)]
    rewards = penalise(on_last_token(np.array([1.0, 0.0]), masks), [np.array([0.1, 0.1]), np.array([0.3])], 0.5)
    returns = np.array([0.9, 0.95, -0.15])
    got = np.concatenate(reinforce_plus_plus(rewards, masks, booleans(1, 1)).tokens)
    np.testing.assert_allclose(got, (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8), atol=1e-12)


def test_baseline_form_of_reinforce_plus_plus() -> None:
    """r - mean of group, over tokens, whitened: a sample's weight in mean and variance is its length."""
    rewards, group = np.array([1.0, 0.0, 3.0, 1.0]), np.array([0, 0, 1, 1])
    masks = [np.ones(n, dtype=np.bool_) for n in (1, 2, 3, 1)]
    centred, keep = group_relative(rewards, np.ones(4, dtype=np.bool_), group, normalize_by_std=False)
    got = np.concatenate(whiten(spread(centred, masks), masks, keep).tokens)
    tokens = np.array([0.5, -0.5, -0.5, 1, 1, 1, -1])
    np.testing.assert_allclose(got, (tokens - tokens.mean()) / tokens.std(ddof=1), atol=1e-7)


# -- KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_kl(estimator: Any) -> None:
    policy, reference, mask = np.array([-1.0, -2.0, -3.0]), np.array([-1.5, -1.0, math.nan]), booleans(1, 1, 0)
    by_hand = {
        "k1": [0.5, -1.0],
        "k2": [0.125, 0.5],
        "k3": [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1],
    }
    got = token_kl([policy], [reference], [mask], estimator)[0]
    np.testing.assert_allclose(got, [*by_hand[estimator], 0.0], atol=1e-12)
    far = token_kl([np.array([0.0])], [np.array([-800.0])], [booleans(1)], estimator)[0]
    assert far[0] == {"k1": 800.0, "k2": 200.0, "k3": pytest.approx(19.0, abs=1e-8)}[estimator]


def test_kl_in_the_reward_of_a_sample_is_summed_over_its_tokens() -> None:
    got = penalise_samples(np.array([1.0, 2.0]), [np.array([0.1, 0.2]), np.array([-0.5])], 0.5)
    np.testing.assert_allclose(got, [0.85, 2.25], atol=1e-12)


def test_adaptive_coefficient() -> None:
    coefficient = AdaptiveCoefficient(value=0.1, target=6.0, horizon=1000)
    assert coefficient.adjust(6.0, 256).value == pytest.approx(0.1)
    assert coefficient.adjust(6.6, 256).value == pytest.approx(0.1 * (1 + 0.1 * 0.256))
    assert coefficient.adjust(600.0, 256).value == pytest.approx(0.1 * (1 + 0.2 * 0.256))
    assert coefficient.adjust(0.0, 256).value == pytest.approx(0.1 * (1 - 0.2 * 0.256))
    assert coefficient.adjust(math.nan, 256) == coefficient


# -- steps -------------------------------------------------------------------------------------------------

STEPS = np.array([0.9, 0.4, 0.8, 0.2])


def to_go(steps: np.ndarray) -> np.ndarray:
    return np.cumsum(steps[::-1])[::-1]


def test_clip_and_delta() -> None:
    np.testing.assert_allclose(clip(STEPS, 0.5), [0, -0.1, 0, -0.3], atol=1e-12)
    np.testing.assert_allclose(delta(STEPS), [0.5, -0.4, 0.8, 0], atol=1e-12)
    np.testing.assert_allclose(to_go(delta(STEPS)), [0.9, 0.4, 0.8, 0], atol=1e-12)
    both = delta(clip(STEPS, 0.5))
    np.testing.assert_allclose(both, [0.1, -0.1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(to_go(both), [0, -0.1, 0, 0], atol=1e-12)
    repeated = np.full(6, 0.9)
    assert (repeated.sum(), delta(repeated).sum()) == pytest.approx((5.4, 0.9))
    assert not clip(repeated, 0.5).any()


@given(st.lists(st.floats(-5, 5), max_size=8))
def test_delta_returns_are_the_step_rewards(steps: list[float]) -> None:
    returns = to_go(delta(np.array(steps)))
    np.testing.assert_allclose(returns[:-1], steps[:-1], atol=1e-9)
    assert len(returns) == len(steps)


def test_min_form_of_one_response() -> None:
    steps = np.array([0.8, -0.5, 0.3])
    rewards = soft_min_rewards(steps, 0.1)
    np.testing.assert_allclose(rewards / steps, [0.000002, 0.999662, 0.000335], atol=1e-6)
    np.testing.assert_allclose(to_go(rewards), [-0.499729, -0.499731, 0.000101], atol=1e-6)
    np.testing.assert_allclose(soft_min_rewards(steps, 1.0), [0.126622, -0.290384, 0.078287], atol=1e-6)
    assert soft_min_rewards(steps, 1.0).sum() == pytest.approx(-0.085475, abs=1e-6)
    np.testing.assert_allclose(to_go(soft_min_rewards(steps, 1e-3)), [-0.5, -0.5, 0.0], atol=1e-9)
    np.testing.assert_allclose(to_go(soft_min_rewards(steps[2:], 1e-3)), [0.3], atol=1e-9)
    assert len(soft_min_rewards(np.zeros(0))) == 0


def test_min_form_advantages() -> None:
    steps = [np.array([0.8, -0.5, 0.3]), np.array([0.4])]
    lengths = [np.array([2, 1, 1]), np.array([2])]
    advantages = min_form(steps, lengths, booleans(1, 1), np.array([0, 0]))
    rewards = soft_min_rewards(steps[0])
    first = to_go(rewards - 0.2 * np.array([2, 1, 1]))  # the other's 0.4 over 2 tokens
    np.testing.assert_allclose(advantages[0], first, atol=1e-12)
    np.testing.assert_allclose(advantages[1], [0.4 - 2 * rewards.sum() / 4], atol=1e-12)
    alone = min_form(steps, lengths, booleans(1, 0), np.array([0, 0]))
    assert not np.concatenate(alone).any()


def test_step_rewards_stand_on_the_last_trained_token_of_their_step() -> None:
    """A step of a tool's words is paid to what was said before it."""
    spans = np.array([[0, 1], [1, 3], [3, 4], [4, 5]])
    steps = Steps([np.array([8.0, 1.0, 2.0, 4.0])], [spans], [booleans(0, 1, 0, 1, 0)])
    assert steps.on_last_tokens()[0].tolist() == [0.0, 1.0, 0.0, 6.0, 0.0]
