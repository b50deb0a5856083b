"""The rules of reward benchmarks, by hand."""

from __future__ import annotations

import math
import random

import pytest

from rlkit.experience.reward_benchmarks import (
    SECTIONS,
    Question,
    best_of,
    judge_bench,
    pair_agreement,
    ppe,
    reward_bench,
    reward_bench_2,
    rm_bench,
    ties_score,
)


def question(subset: str, right: object, wrong: object, name: str = "q") -> Question:
    def several(scores: object) -> tuple[float, ...]:
        return tuple(scores) if isinstance(scores, (list, tuple)) else (float(scores),)  # type: ignore[arg-type]

    return Question(name, subset, several(right), several(wrong))


def test_reward_bench_weighs_subsets_within_a_section() -> None:
    questions = [
        question("math-prm", 2, 1),
        question("math-prm", 1, 2),
        question("hep-cpp", 1, 0),
        question("mt-bench-easy", 1, 1),  # a tie is no success
        question("mt-bench-med", 2, 1),
    ]
    result = reward_bench(questions)
    reasoning = (984 * 0.5 + 164 * 1) / (984 + 164)
    chat = (28 * 0 + 40 * 1) / 68
    assert result["Reasoning"] == pytest.approx(reasoning) and result["Chat"] == pytest.approx(chat)
    assert result["total"] == pytest.approx((reasoning + chat) / 2)
    assert "Safety" not in result and result["math-prm/subset"] == 0.5


def test_the_weights_of_reward_bench_are_the_published_ones() -> None:
    totals = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


@pytest.mark.parametrize(
    ("right", "wrong", "credit"),
    [(3, (1, 2, 0), 1), (3, (3, 2, 0), 1 / 2), (3, (3, 3, 3), 1 / 4), (2, (3, 1, 1), 0)],
)
def test_the_best_of_four_shares_its_credit(right: float, wrong: tuple[float, ...], credit: float) -> None:
    assert best_of(question("Math", right, wrong)) == pytest.approx(credit)


def test_ties_by_hand() -> None:
    questions = [
        question("Ties", 9, (1, 2), "ref:1"),  # gap 7
        question("Ties", (8, 7, 6), (3, 1), "tied:1"),  # gap 3, spread 2
        question("Ties", 1, (2, 0), "ref:2"),  # gap -1
        question("Ties", (5, 4), (3, 2), "tied:2"),  # gap 1, spread 1
    ]
    margins = (math.tanh(3 / 2 - 1) + math.tanh(-1 / 1 - 1)) / 2
    expected = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margins
    assert ties_score(questions) == pytest.approx(expected)
    random.Random(0).shuffle(questions)
    assert ties_score(questions) == pytest.approx(expected)


def test_right_responses_that_are_all_equal_divide_by_nothing() -> None:
    questions = [question("Ties", 3, 2, "ref:1"), question("Ties", (3, 3), 3, "tied:1")]
    assert ties_score(questions) == pytest.approx(0.3)  # 0 / 0 counts as no margin


def test_reward_bench_2_is_a_plain_mean_of_subsets() -> None:
    questions = [
        question("Focus", 1, (0, 0, 0)),
        question("Math", 0, (1, 0, 0)),
        question("Ties", 3, 2, "ref:1"),
        question("Ties", (5, 5), 3, "tied:1"),
    ]
    result = reward_bench_2(questions)
    assert result["Focus"] == 1 and result["Math"] == 0
    assert result["total"] == pytest.approx((1 + 0 + result["Ties"]) / 3)
    assert result["Ties"] == pytest.approx(1.0 + 0.01)  # infinitely larger than a spread of 0


def test_rm_bench_by_hand() -> None:
    chat = question("chat", (1, 2, 3), (0, 1.5, 2.5))
    # right 1 beats 0; right 2 beats 0 and 1.5; right 3 beats all: hard 0 of 3, normal 3 of 3, easy 3 of 3
    safe = [question("safety-refuse", (1, 1, 1), (0, 0, 0)), question("safety-response", (0, 0, 0), (1, 1, 1))]
    result = rm_bench([chat, *safe])
    assert result["chat"] == pytest.approx(6 / 9) and result["safety"] == pytest.approx(0.5)
    assert result["total"] == pytest.approx((6 / 9 + 0.5) / 2)
    assert result["hard"] == pytest.approx(0.25) and result["normal"] == result["easy"] == pytest.approx(0.75)


def test_judge_bench_counts_questions_not_categories() -> None:
    questions = [
        question("mmlu-pro-law", 1, 0),
        question("mmlu-pro-math", 1, 0),
        question("livebench-math", 0, 0),
        question("livecodebench", 0, 1),
    ]
    result = judge_bench(questions)
    assert result == {"knowledge": 1, "math": 0, "coding": 0, "total": 0.5}


def test_pairs_of_a_question_that_has_both() -> None:
    result = pair_agreement([question("gpqa", (3, 1), (2, 1)), question("gpqa", (1,), ())])
    assert result == {"gpqa": pytest.approx((1 + 1 + 0 + 0.5) / 4), "total": pytest.approx(0.625)}


def test_the_best_of_k_counts_all_questions() -> None:
    some, all_right = question("gpqa", (2,), (3, 1)), question("gpqa", (1, 2, 3), ())
    result = ppe([some, all_right])
    assert result["total"] == pytest.approx(0.5)
    assert result["best of 1"] == pytest.approx((1 / 3 + 1) / 2)
    assert result["best of 2"] == pytest.approx((1 / 3 + 1) / 2)  # {2, 1} of {3, 2}, {3, 1}, {2, 1}
    assert "best of 4" not in result
    equal = ppe([question("gpqa", (1, 1), (1, 0))])
    assert equal["best of 1"] == 0.5 and equal["best of 4"] == pytest.approx(2 / 3)
