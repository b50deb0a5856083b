"""Scores of steps and what they choose: the published example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prime_tables import BETA, Q

from algorithms.functional.selection import (
    best_of_n,
    best_threshold,
    first_errors,
    majority,
    process_bench,
    sigmoid,
    subsets,
    vote,
)
from rewards.implicit_prm.steps import aggregate, step_scores

A = [np.array(q) for q in Q[:4]]
SPANS = [[(0, 2), (2, 3)], [(0, 1), (1, 2)], [(0, 1), (1, 4)], [(0, 1)]]
SINGLE = [[0.01, 0.03], [-0.02, -0.01], [0.01, 0.03], [-0.03]]
CUMULATIVE = [[0.01, 0.04], [-0.02, -0.03], [0.01, 0.04], [-0.03]]
MIN_SINGLE = [0.01, -0.02, 0.01, -0.03]
MIN_CUMULATIVE = [0.01, -0.03, 0.01, -0.03]
SUM_SINGLE = [0.04, -0.03, 0.04, -0.03]
MEAN_SINGLE = [0.02, -0.015, 0.02, -0.03]


def test_single_and_cumulative_step_scores() -> None:
    for q, spans, single, cumulative in zip(A, SPANS, SINGLE, CUMULATIVE, strict=True):
        np.testing.assert_allclose(step_scores(q, spans, BETA), single, atol=1e-12)
        np.testing.assert_allclose(step_scores(q, spans, BETA, "cumulative"), cumulative, atol=1e-12)


def test_aggregates() -> None:
    single = [step_scores(q, spans, BETA) for q, spans in zip(A, SPANS, strict=True)]
    cumulative = [step_scores(q, spans, BETA, "cumulative") for q, spans in zip(A, SPANS, strict=True)]
    np.testing.assert_allclose([aggregate(d) for d in single], MIN_SINGLE, atol=1e-12)
    np.testing.assert_allclose([aggregate(c, "min") for c in cumulative], MIN_CUMULATIVE, atol=1e-12)
    np.testing.assert_allclose([aggregate(d, "sum") for d in single], SUM_SINGLE, atol=1e-12)
    np.testing.assert_allclose([aggregate(c, "last") for c in cumulative], SUM_SINGLE, atol=1e-12)
    np.testing.assert_allclose([aggregate(d, "mean") for d in single], MEAN_SINGLE, atol=1e-12)


def test_best_of_four_is_the_earlier_of_two_equal_ones() -> None:
    assert best_of_n(np.array(MIN_SINGLE)) == 0
    assert best_of_n(np.array(MIN_SINGLE)[::-1]) == 1
    for bad in (np.array([]), np.array([0.1, math.nan])):
        with pytest.raises(ValueError, match="at least one score and no NaN"):
            best_of_n(bad)


def test_weighted_vote() -> None:
    weights = sigmoid(np.array(MIN_SINGLE))
    assert weights[[0, 2]].sum() == pytest.approx(1.005000, abs=1e-6)
    assert weights[[1, 3]].sum() == pytest.approx(0.987501, abs=1e-6)
    assert vote(["7", "5", "7", "5"], weights) == 0
    assert vote(["5", "7", "5", "7"], sigmoid(-np.array(MIN_SINGLE))) == 1
    assert majority(["5", "7", "7", None]) == 1
    assert majority(["5", "7", "7", "5"]) == 0, "a tie goes to the earlier answer"
    assert vote([None, None], np.ones(2)) == 0
    assert vote([None, "3"], np.array([9.0, 0.1])) == 1, "no answer, no vote"


TOY = [np.array([0.02, 0.03, 0.05]), np.array([0.02, -0.01, 0.01]), np.array([-0.02, -0.03]), np.array([0.01, -0.005])]
TOY_LABELS = np.array([-1, 1, 0, -1])


@pytest.mark.parametrize(
    ("threshold", "correct", "error", "f1"),
    [(0.496, 1.0, 0.5, 2 / 3), (0.498, 1.0, 1.0, 1.0), (0.499, 0.5, 1.0, 2 / 3)],
)
def test_process_bench(threshold: float, correct: float, error: float, f1: float) -> None:
    result = process_bench(TOY, TOY_LABELS, threshold)
    assert (result.correct_accuracy, result.error_accuracy) == (correct, error)
    assert result.f1 == pytest.approx(f1)


@pytest.mark.parametrize(
    ("errors", "found", "correct", "accepted", "published"),
    [
        (207, 47, 193, 181, (22.71, 93.78, 36.56)),
        (594, 227, 406, 287, (38.22, 70.69, 49.61)),
        (661, 179, 339, 183, (27.08, 53.98, 36.07)),
        (759, 212, 241, 132, (27.93, 54.77, 37.00)),
    ],
    ids=["gsm8k", "math", "olympiadbench", "omnimath"],
)
def test_process_bench_makes_the_published_f1_of_published_shares(
    errors: int, found: int, correct: int, accepted: int, published: tuple[float, float, float]
) -> None:
    """Qwen2.5-Math-7B-Instruct-PRM-0.2 (huggingface/ProcessBench, README at 00f1c67), whose precision is the share of
    errors found and whose recall that of correct solutions; counts are those that round to these shares."""
    wrong_at_1, right = np.array([0.5, -0.5]), np.array([0.5, 0.5])
    cumulative = [wrong_at_1] * found + [right] * (errors - found + accepted) + [wrong_at_1] * (correct - accepted)
    result = process_bench(cumulative, np.array([1] * errors + [-1] * correct), 0.5)
    shares = (result.error_accuracy, result.correct_accuracy, result.f1)
    assert tuple(round(100 * share, 2) for share in shares) == published


def test_threshold_search_finds_the_perfect_threshold() -> None:
    best = best_threshold(TOY, TOY_LABELS)
    assert best.f1 == 1.0
    assert process_bench(TOY, TOY_LABELS, best.threshold) == best


@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=5), min_size=2, max_size=8), st.data())
def test_searched_threshold_does_what_it_says_and_beats_a_grid(rows: list[list[float]], data: st.DataObject) -> None:
    cumulative = [np.array(row) for row in rows]
    labels = np.array([data.draw(st.integers(-1, len(row) - 1)) for row in rows])
    labels[:2] = (-1, 0)  # both kinds
    best = best_threshold(cumulative, labels)
    again = process_bench(cumulative, labels, best.threshold)
    assert (again.error_accuracy, again.correct_accuracy) == (best.error_accuracy, best.correct_accuracy)
    # Values that differ by less than a float's resolution of their middle cannot be told apart by any threshold.
    assert best.f1 >= max(process_bench(cumulative, labels, th).f1 for th in np.linspace(0.011, 0.989, 50)) - 1e-9


def test_first_errors() -> None:
    assert first_errors(TOY, 0.498).tolist() == [-1, 1, 0, -1]


def test_subsets_are_all_or_a_random_few() -> None:
    assert list(subsets(4, 2, limit=10, seed=0)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    few = list(subsets(40, 20, limit=10, seed=0))
    assert len(few) == 10 and all(list(chosen) == sorted(set(chosen)) for chosen in few)
