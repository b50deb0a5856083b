"""The embedded arithmetic task: correct, seeded, and split by problem."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from rlkit.data.arithmetic import SITUATIONS, STYLES, Arithmetic, ArithmeticConfig, draw_problems, write_solution
from rlkit.data.base import DataError

CONFIG = ArithmeticConfig()
TRAIN = draw_problems(CONFIG, "train")
HELDOUT = draw_problems(CONFIG, "heldout")


def test_every_calculation_is_right_and_within_the_ranges() -> None:
    for problem in TRAIN + HELDOUT:
        value = problem.steps[0].left
        for step in problem.steps:
            assert step.left == value
            assert (
                step.result
                == {"+": value + step.right, "-": value - step.right, "*": value * step.right}[step.operator]
            )
            assert 0 <= step.result <= CONFIG.max_value
            value = step.result


def test_the_question_states_every_number() -> None:
    for problem in HELDOUT:
        stated = sorted(int(number) for number in re.findall(r"\d+", problem.question))
        assert stated == sorted([problem.steps[0].left, *(step.right for step in problem.steps)])
        assert not re.search(r"[{}]", problem.question)


def test_splits_share_no_problem_even_under_other_names() -> None:
    assert not {problem.skeleton for problem in TRAIN} & {problem.skeleton for problem in HELDOUT}
    assert len({problem.question for problem in TRAIN}) == len(TRAIN) == CONFIG.train_problems
    assert len({problem.question for problem in HELDOUT}) == len(HELDOUT) == CONFIG.heldout_problems


def test_situations_and_lengths_all_occur() -> None:
    assert len(SITUATIONS) >= 8
    for problems in (TRAIN, HELDOUT):
        assert {problem.situation for problem in problems} == {situation.name for situation in SITUATIONS}
        assert {len(problem.steps) for problem in problems} == {1, 2, 3}


def test_references_are_distinct_phrasings_that_end_in_the_gold_answer() -> None:
    problems, bad_rows = Arithmetic(CONFIG, seed=0).load("heldout")
    assert bad_rows == []
    for problem in problems:
        assert len(set(problem.references)) == len(STYLES) >= 3
        for reference in problem.references:
            assert reference.splitlines()[-1] == f"#### {problem.answer}"


def test_the_runs_seed_does_not_move_the_split() -> None:
    assert Arithmetic(CONFIG, seed=0).load("heldout") == Arithmetic(CONFIG, seed=7).load("heldout")
    other = draw_problems(ArithmeticConfig(problem_seed=1), "heldout")
    assert [problem.question for problem in other] != [problem.question for problem in HELDOUT]


def test_a_smaller_split_is_the_beginning_of_a_larger_one() -> None:
    assert draw_problems(ArithmeticConfig(heldout_problems=64), "heldout") == HELDOUT[:64]


def test_annotated_style_is_gsm8ks() -> None:
    problem = next(problem for problem in HELDOUT if len(problem.steps) == 2)
    first, second, last = write_solution(problem.steps, problem.thing, "annotated").splitlines()
    step = problem.steps[0]
    assert first == f"<<{step.left}{step.operator}{step.right}={step.result}>>{step.result} {problem.thing}"
    assert second.startswith(f"<<{step.result}") and last == f"#### {problem.answer}"


def test_ranges_without_enough_problems_are_refused_by_name() -> None:
    tiny = ArithmeticConfig(max_steps=1, max_operand=4, max_value=8, max_factor=2)
    with pytest.raises(DataError, match="train_problems"):
        draw_problems(tiny, "train")
    with pytest.raises(ValidationError, match="min_steps=3 is larger than max_steps=2"):
        ArithmeticConfig(min_steps=3, max_steps=2)
