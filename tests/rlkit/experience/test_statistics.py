"""Estimates of k answers, intervals and comparisons, against worked numbers and counting."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.experience.statistics import (
    Estimate,
    agreement,
    best_sizes,
    compare,
    correlation,
    expected_best,
    expected_choice,
    expected_majority,
    expected_worst,
    mean_of_questions,
    ranks,
    sign_test,
    student_t,
    wilson,
)


@pytest.mark.parametrize(
    ("degrees", "t"),
    [
        # Tables of Student's distribution, 0.975.
        *[(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (15, 2.1314)],
        *[(29, 2.0452), (30, 2.0423), (60, 2.0003), (120, 1.9799), (100_000, 1.95999)],
    ],
)
def test_the_quantile_of_student_is_that_of_the_tables(degrees: int, t: float) -> None:
    assert student_t(degrees) == pytest.approx(t, abs=6e-5)


def test_an_interval_of_many_questions_is_the_textbook_one() -> None:
    """36 questions, half of them 0.2 and half 0.8: s = 0.3 * sqrt(36 / 35), t(35) = 2.0301."""
    estimate = mean_of_questions([0.2] * 18 + [0.8] * 18)
    error = 2.030108 * 0.3 * math.sqrt(36 / 35) / 6
    assert estimate.value == pytest.approx(0.5)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - error, 0.5 + error), abs=1e-6)
    assert estimate.questions == 36


def test_clusters_make_it_wider_than_independent_answers_would() -> None:
    """Ten answers to each of 40 questions that are all alike within a question: 40 facts, not 400."""
    means = [1.0] * 20 + [0.0] * 20
    naive = mean_of_questions([mean for mean in means for _ in range(10)])
    clustered = mean_of_questions(means)
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(10), rel=0.05)


def test_a_share_of_which_all_are_right_is_as_uncertain_as_wilson_says() -> None:
    assert mean_of_questions([1.0] * 20, share=True) == Estimate(1.0, *wilson(20, 20), 20)
    assert mean_of_questions([1.0] * 20, share=True).low == pytest.approx(0.8389, abs=1e-4)
    low = mean_of_questions([0.0] * 99 + [1.0], share=True).low
    assert low == 0.0, "a share is not below 0"


def test_few_questions_have_an_interval_that_holds_the_truth() -> None:
    """Coverage of 100 simulated evaluations: at 95 % fewer than 88 come by chance once in 300 times."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(100):
        means = rng.binomial(4, rng.beta(1.0, 1.0, 12)) / 4
        estimate = mean_of_questions(means, share=True)
        hits += estimate.low <= 0.5 <= estimate.high
    assert hits >= 88


def test_one_question_and_none() -> None:
    one = mean_of_questions([0.5])
    assert (one.value, one.questions) == (0.5, 1) and math.isnan(one.low)
    assert mean_of_questions([]).questions == 0


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_the_order_of_questions_changes_nothing(means: list[float], shuffles: random.Random) -> None:
    shuffled = list(means)
    shuffles.shuffle(shuffled)
    assert mean_of_questions(shuffled) == mean_of_questions(means)


def by_counting(n: int, k: int, value: Callable[[tuple[int, ...]], float]) -> float:
    return float(np.mean([value(subset) for subset in combinations(range(n), k)]))


ANSWERS = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8)


@given(ANSWERS, st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_majority_of_k_by_counting_all_subsets(answers: list[str | None], k: int, order: random.Random) -> None:
    values = {"a": 1.0, "b": 0.0, "c": 0.25, None: 0.0}
    own = np.array([values[answer] for answer in answers])
    if k > len(answers):
        with pytest.raises(ValueError, match=f"majority of {k}"):
            expected_majority(answers, own, k)
        return

    def voted(subset: tuple[int, ...]) -> float:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        most = [answer for answer, count in votes.items() if count == max(votes.values())]
        return float(np.mean([values[answer] for answer in most])) if votes else 0.0

    expected = expected_majority(answers, own, k)
    assert expected == pytest.approx(by_counting(len(answers), k, voted), abs=1e-12)
    places = list(range(len(answers)))
    order.shuffle(places)
    assert expected_majority([answers[i] for i in places], own[places], k) == pytest.approx(expected, abs=1e-12)


def test_the_majority_of_many_answers_is_what_the_votes_say() -> None:
    """Of 64 answers 40 are right: any 64 of 64 have that majority, and of one the share is right."""
    answers = ["right"] * 40 + [str(i) for i in range(24)]
    values = np.repeat([1.0, 0.0], [40, 24])
    assert expected_majority(answers, values, 64) == 1.0
    assert expected_majority(answers, values, 1) == pytest.approx(40 / 64)
    assert expected_majority(answers, values, 2) == pytest.approx(40 / 64)  # two that differ draw lots
    assert expected_majority(answers, values, 16) > 0.99


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 3)), min_size=1, max_size=7), st.integers(1, 7))
def test_the_best_by_a_reward_by_counting(drawn: list[tuple[float, int]], k: int) -> None:
    if k > len(drawn):
        return
    values, scores = np.array([value for value, _ in drawn]), np.array([float(score) for _, score in drawn])

    def chosen(subset: tuple[int, ...]) -> float:
        best = [i for i in subset if scores[i] == max(scores[list(subset)])]
        return float(np.mean(values[best]))

    assert expected_choice(values, scores, k) == pytest.approx(by_counting(len(values), k, chosen), abs=1e-12)
    assert expected_choice(values, np.zeros(len(values)), k) == pytest.approx(values.mean())  # at random
    assert expected_choice(values, values, k) == expected_best(values, k)  # the oracle


def test_pass_hat_k_is_the_published_formula() -> None:
    """C(c, k) / C(n, k) of arXiv 2406.12045."""
    for n, c, k in [(8, 5, 1), (8, 5, 4), (8, 3, 4), (8, 8, 8), (4, 0, 2)]:
        values = np.repeat([0.0, 1.0], [n - c, c])
        assert expected_worst(values, k) == pytest.approx(math.comb(c, k) / math.comb(n, k), abs=1e-12)


def test_the_sizes_of_k() -> None:
    assert [best_sizes(n) for n in (1, 2, 3, 8, 12)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 12]]


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (9, 1, 0.021484375), (6, 4, 0.75390625)]
)
def test_the_sign_test_is_the_binomial_one(better: int, worse: int, p: float) -> None:
    assert sign_test(better, worse) == sign_test(worse, better) == p


def test_a_winner_is_called_only_where_the_interval_does_not_hold_0() -> None:
    rng = np.random.default_rng(0)
    first = {f"q{i}": float(value) for i, value in enumerate(rng.uniform(size=50))}
    noise = {question: value + float(rng.normal(0, 0.3)) for question, value in first.items()}
    assert compare(first, noise).winner is None
    better = {question: value + float(rng.normal(0.3, 0.3)) for question, value in first.items()}
    assert (compare(first, better).winner, compare(better, first).winner) == ("second", "first")
    assert compare(first, first).winner is None
    few = {f"q{i}": 0.0 for i in range(4)}
    assert compare(few, dict.fromkeys(few, 1.0)).winner is None, "four of four are chance once in eight"
    many = {f"q{i}": 0.0 for i in range(20)}
    assert compare(many, dict.fromkeys(many, 1.0)).winner == "second"
    assert compare({"a": 0.2}, {"a": 0.9}).winner is None, "one question has no interval"


def test_only_questions_that_both_answered_are_compared() -> None:
    difference = compare({"a": 0.0, "b": 1.0, "c": 0.5}, {"b": 0.0, "c": 0.5, "d": 1.0})
    assert (difference.mean.questions, difference.mean.value) == (2, -0.5)
    assert (difference.better, difference.worse) == (0, 1)
    with pytest.raises(ValueError, match="no question"):
        compare({"a": 0.0}, {"b": 0.0})


def test_a_paired_difference_is_finer_than_two_means() -> None:
    """Questions differ by far more than the models do."""
    rng = np.random.default_rng(1)
    hard = rng.uniform(size=60)
    first, second = ({f"q{i}": float(h + rng.normal(step, 0.02)) for i, h in enumerate(hard)} for step in (0.0, 0.05))
    apart = [mean_of_questions(list(values.values())) for values in (first, second)]
    assert apart[0].high > apart[1].low
    assert compare(first, second).winner == "second"


def test_two_rewards_on_the_same_answers() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 16.0])
    assert correlation(ranks(one), ranks(other)) == pytest.approx(1.0)
    assert correlation(one, other) == pytest.approx(0.984374, abs=1e-6)
    assert math.isnan(correlation(one, np.ones(4)))
    assert agreement([(one, other), (np.array([0.0, 1.0]), np.array([1.0, 0.0]))]) == pytest.approx(6 / 7)
    assert math.isnan(agreement([(one, np.ones(4))]))
