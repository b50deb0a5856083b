"""Transforms of rewards: exact values from the papers' formulas and code, and the properties that they promise."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algorithms.functional.advantages import overlong_penalty
from algorithms.functional.step_credit import clip, delta
from rewards.combined.scores import Rule, parse_combiner
from rewards.shaping.references import (
    Form,
    centred,
    log_sigmoid,
    log_sigmoid_centred,
    preference_as_reward,
    quintic_sigmoid,
    reference_quantile,
    sigmoid,
)
from rewards.shaping.steps import (
    ClipStd,
    GroupNormalise,
    LengthPenalty,
    MinMax,
    RunningStatistics,
    Standardise,
)

REFERENCES = np.array([0.2, 1.0, -0.5])
REWARD = np.array([1.5])
RUNNING = np.array([1.0, 3.0, 2.0, 6.0])
LENGTHS = np.zeros(0, dtype=np.int64)
MEMBERS = np.array([1.0, 2.0, 0.5, 1.5, 3.0])
STEPS = np.array([0.9, 0.4, 0.8, 0.2])
finite = st.floats(-1e6, 1e6)


def close(found: object, expected: object) -> bool:
    return bool(np.allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-6))


def aggregate(kind: str, values: np.ndarray, weights: np.ndarray, spread_weight: float = 1.0) -> float:
    return Rule(parse_combiner(kind), spread_weight)(values, weights)


def to_go(rewards: np.ndarray) -> np.ndarray:
    return np.cumsum(rewards[::-1])[::-1]


def test_par_is_the_mean_sigmoid_over_the_references() -> None:
    assert close(preference_as_reward(REWARD, REFERENCES), [0.763030])
    assert close(preference_as_reward(REWARD, REFERENCES[:1]), [0.785835])
    assert close(preference_as_reward(REWARD, np.zeros(1), k=2.0), sigmoid(np.array([3.0])))
    # slow then fast: the sigmoid of r - 3
    assert close(preference_as_reward(REWARD, REFERENCES[:1], offset=3.0), sigmoid(np.array([-1.7])))
    assert close(centred(REWARD, REFERENCES), [1.5 - 0.7 / 3])


@pytest.mark.parametrize(("form", "value"), [("tanh", np.tanh(1.3)), ("arctan", np.arctan(1.3))])
def test_the_other_forms_of_par(form: Form, value: float) -> None:
    assert close(preference_as_reward(REWARD, REFERENCES[:1], form=form), [value])


def test_the_quintic_is_close_to_the_sigmoid_and_flat_outside() -> None:
    inside = np.linspace(-4.9, 4.9, 99)
    assert np.abs(quintic_sigmoid(inside) - sigmoid(inside)).max() < 0.03
    assert quintic_sigmoid(np.array([-50.0, -5.0, 0.0, 5.0, 50.0])) == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-9)


@given(st.lists(finite, min_size=1, max_size=8), st.lists(finite, min_size=1, max_size=8))
def test_par_keeps_the_order_and_stays_within_0_and_1(rewards: list[float], references: list[float]) -> None:
    shaped = preference_as_reward(np.sort(rewards), np.array(references))
    assert np.isfinite(shaped).all()
    assert (np.diff(shaped) >= -1e-12).all()
    assert ((shaped >= 0) & (shaped <= 1)).all()


def test_lsc_by_each_fit_of_the_quantile() -> None:
    assert NormalDist().inv_cdf(0.85) == pytest.approx(1.036433, abs=1e-6)
    normal = reference_quantile(REFERENCES)
    assert normal == pytest.approx(1.011244, abs=1e-6)
    assert close(log_sigmoid_centred(REWARD, normal), [-0.478337])
    population = float(REFERENCES.mean() + NormalDist().inv_cdf(0.85) * (REFERENCES.std() + 1e-5))
    assert population == pytest.approx(0.868497, abs=1e-6)
    assert close(log_sigmoid_centred(REWARD, population), [-0.426438])
    empirical = reference_quantile(REFERENCES, fit="empirical")
    assert empirical == pytest.approx(0.76, abs=1e-6)
    assert close(log_sigmoid_centred(REWARD, empirical), [-0.390090])


def test_lsc_needs_two_references_for_a_normal_fit_and_one_at_all() -> None:
    with pytest.raises(ValueError, match="at least two"):
        reference_quantile(REFERENCES[:1])
    assert reference_quantile(REFERENCES[:1], fit="empirical") == pytest.approx(0.2)
    for call in (lambda: centred(REWARD, np.zeros(0)), lambda: reference_quantile(np.zeros(0), fit="empirical")):
        with pytest.raises(ValueError, match="no reference"):
            call()


def test_the_sum_of_lsc_is_a_logical_and() -> None:
    ones = np.ones(2)
    assert aggregate("logical_and", np.array([2.0, -1.0]), ones) == pytest.approx(-1.440190, abs=1e-6)
    assert aggregate("logical_and", np.array([0.5, 0.5]), ones) == pytest.approx(-0.948154, abs=1e-6)
    assert aggregate("sum", np.array([2.0, -1.0]), ones) == aggregate("sum", np.array([0.5, 0.5]), ones) == 1.0
    shaped = np.concatenate([log_sigmoid_centred(np.array([2.0]), 0.0), log_sigmoid_centred(np.array([-1.0]), 0.0)])
    assert aggregate("sum", shaped, ones) == pytest.approx(-1.440190, abs=1e-6)


def test_log_sigmoid_neither_overflows_nor_falls_below_its_floor() -> None:
    assert close(log_sigmoid(np.array([-1000.0, 0.0, 1000.0])), [-1000.0, -np.log(2), 0.0])
    assert log_sigmoid_centred(np.array([-1000.0]), 0.0, floor=-5.0)[0] == -5.0


@pytest.mark.parametrize(
    ("combine", "spread", "expected"),
    [
        ("mean", 1.0, 1.6),
        ("median", 1.0, 1.5),
        ("min", 1.0, 0.5),
        ("mean_minus_std", 1.0, 0.739767),
        ("mean_minus_variance", 0.5, 1.23),
    ],
)
def test_ensembles(combine: str, spread: float, expected: float) -> None:
    assert aggregate(combine, MEMBERS, np.ones(5), spread) == pytest.approx(expected, abs=1e-6)


def test_product_and_weighted_mean() -> None:
    assert aggregate("product", np.array([0.8, 0.5, 1.0]), np.ones(3)) == pytest.approx(0.4)
    assert aggregate("mean", np.array([1.0, 4.0]), np.array([3.0, 1.0])) == pytest.approx(1.75)
    with pytest.raises(ValueError, match="nothing to combine"):
        aggregate("sum", np.zeros(0), np.zeros(0))


def test_clip_and_delta() -> None:
    assert close(clip(STEPS, 0.5), [0, -0.1, 0, -0.3])
    assert close(delta(STEPS), [0.5, -0.4, 0.8, 0])
    assert close(to_go(delta(STEPS)), [0.9, 0.4, 0.8, 0])
    both = delta(clip(STEPS, 0.5))
    assert close(both, [0.1, -0.1, 0, 0])
    assert close(to_go(both), [0, -0.1, 0, 0])


def test_repeating_a_good_step_earns_nothing() -> None:
    repeated = np.full(6, 0.9)
    assert repeated.sum() == pytest.approx(5.4)
    assert delta(repeated).sum() == pytest.approx(0.9)
    assert clip(repeated, 0.5).sum() == 0.0


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_the_reward_to_go_of_delta_is_the_step_reward(steps: list[float]) -> None:
    shaped = delta(np.array(steps))
    assert shaped[-1] == 0.0
    assert np.allclose(to_go(shaped)[:-1], steps[:-1])


@pytest.mark.parametrize("steps", [[], [0.7], [0.7, 0.1]])
def test_few_steps(steps: list[float]) -> None:
    expected = {0: [], 1: [0.0], 2: [0.7, 0.0]}[len(steps)]
    assert close(delta(np.array(steps)), expected)


def test_running_statistics_as_in_par_s_code() -> None:
    statistics = RunningStatistics()
    statistics.add(RUNNING)
    assert close(Standardise().normalise(RUNNING, statistics), [-1.069045, 0, -0.534522, 1.603567])
    assert close(ClipStd().normalise(RUNNING, statistics), [1.129171, 3, 2, 4.870829])
    assert close(MinMax().normalise(RUNNING, statistics), [0, 0.4, 0.2, 1])


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=6))
def test_running_statistics_do_not_depend_on_the_batches(batches: list[list[float]]) -> None:
    merged, everything = RunningStatistics(), np.array([value for batch in batches for value in batch])
    for batch in batches:
        merged.add(np.array(batch))
    assert merged.count == len(everything)
    if len(everything):
        assert merged.mean == pytest.approx(everything.mean(), abs=1e-6)
        assert merged.std == pytest.approx(everything.std(), abs=1e-5)
        assert (merged.least, merged.greatest) == (everything.min(), everything.max())


def test_running_statistics_without_values_or_spread_change_nothing_or_centre() -> None:
    empty, equal = RunningStatistics(), RunningStatistics()
    equal.add(np.full(3, 7.0))
    for transform in (Standardise().normalise, ClipStd().normalise, MinMax().normalise):
        assert close(transform(RUNNING, empty), RUNNING)
        assert np.isfinite(transform(RUNNING, equal)).all()
    assert close(Standardise().normalise(np.array([7.0, 8.0]), equal), [0.0, 1.0])


def test_running_statistics_go_on_from_a_saved_state() -> None:
    first, whole, resumed = RunningStatistics(), RunningStatistics(), RunningStatistics()
    first.add(RUNNING[:2])
    resumed.load_state_dict(first.state_dict())
    resumed.add(RUNNING[2:])
    whole.add(RUNNING)
    assert resumed == whole


def test_costs_of_length() -> None:
    penalty = LengthPenalty(per_token=0.01, free_tokens=300)
    assert close(penalty.apply(np.zeros(3), np.array([10, 300, 350])), [0, 0, -0.5])
    lengths = np.array([16384, 18432, 20480, 30000])
    assert close(overlong_penalty(lengths, max_tokens=20480, buffer_tokens=4096), [0, -0.5, -1, -1])


def test_group_statistics() -> None:
    assert close(GroupNormalise().apply(RUNNING, LENGTHS), [-1.069045, 0, -0.534522, 1.603567])
    assert close(GroupNormalise(divide=False).apply(RUNNING, LENGTHS), RUNNING - 3)
    assert close(GroupNormalise().apply(np.full(3, 0.1), LENGTHS), [0, 0, 0])
    assert close(GroupNormalise().apply(np.array([5.0]), LENGTHS), [0])
