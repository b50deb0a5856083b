"""`data=reasoning_gym`, `reward=reasoning_gym` and `environment=reasoning_gym`, with the real package."""

from __future__ import annotations

from typing import Any

import pytest
from adapter_fixture import act, need
from reward_samples import make_sample

from rewards.base import RewardContext
from rewards.services.reasoning_gym import names_mathematics_alone, score_answer
from rewards.verifiers.reasoning_gym import ReasoningGymReward
from rlkit.data.base import DataError, Problem
from rlkit.data.mixture import Mixture
from rlkit.data.reasoning_gym import COLUMN, ReasoningGymSource
from rlkit.environments.adapters.reasoning_gym import ReasoningGym
from rlkit.environments.base import EnvironmentContext, Task
from rlkit.experience import Group, Prompt, Score

pytestmark = pytest.mark.slow
SIZES = {"train_problems": 20, "heldout_problems": 4}


@pytest.fixture(autouse=True)
def package() -> None:
    need("reasoning_gym")


def source(name: str, **options: Any) -> ReasoningGymSource:
    return ReasoningGymSource(ReasoningGymSource.Config(name=name, **{**SIZES, **options}), 0)


def prompt_of(problem: Problem) -> Prompt:
    return Prompt(problem.id, problem.messages, (1,), problem.references, problem.answer, problem.columns)


def judged(problem: Problem, *texts: str, **options: Any) -> list[Score]:
    """In this process."""
    config = ReasoningGymReward.Config(**options)
    task = ReasoningGymReward(config, RewardContext()).task(prompt_of(problem))
    return [ReasoningGymReward.judge(config, task, text) for text in texts]


# rearc and arc_agi need the tuples of an entry, gsm_symbolic has fractions; the others depend on hashes or on the
# global random numbers
@pytest.mark.parametrize("name", ["chain_sum", "rearc", "gsm_symbolic", "word_ladder", "codeio", "isomorphic_strings"])
def test_questions_are_the_same_in_every_process_and_their_answers_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = source(name)
    (problems, bad), (heldout, _) = drawn.load("train"), drawn.load("heldout")
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    assert source(name).load("train")[0] == problems and not bad
    assert (len(problems), len(heldout)) == (20, 4) and not {p.id for p in problems} & {p.id for p in heldout}
    assert len({problem.messages[0].content for problem in problems}) == 20
    right, bare, wrong = judged(problems[0], f"So <answer>{problems[0].answer}</answer>", str(problems[0].answer), "")
    assert (right.value, right.components) == (1.0, {"correct": 1.0, "format": 1.0})
    assert (bare.value, wrong.value) == (0.0, 0.0) and bare.components["format"] == 0.0


def test_previews_are_the_first_questions() -> None:
    drawn = source("chain_sum")
    few = drawn.preview("train")
    assert few == drawn.load("train")[0][: len(few)] and few
    assert source("chain_sum", problem_seed=1).preview("train") != few


def test_options_and_instructions() -> None:
    (problem,) = source("chain_sum", options={"min_terms": 5, "max_terms": 5}, instructions="", train_problems=1).load(
        "train"
    )[0]
    asked = problem.messages[0].content
    assert asked.count(" + ") + asked.count(" - ") == 4 and "<answer>" not in asked
    assert judged(problem, f"It is\n#### {problem.answer}", answer_in="final_answer")[0].value == 1.0
    assert judged(problem, f"{problem.answer}", answer_in="response")[0].value == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_som", {}, "Dataset 'chain_som' not registered"),
        ("chain_sum", {"options": {"terms": 2}}, "unexpected keyword argument 'terms'"),
    ],
)
def test_what_cannot_be_drawn_is_said(name: str, options: dict[str, Any], message: str) -> None:
    (said,) = source(name, **options).check()
    assert said.startswith(f"data.name={name}: reasoning-gym cannot draw its questions: ") and message in said


def test_options_that_no_question_meets_are_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.data.reasoning_gym.QUIET_SECONDS", 2)
    one_cell = dict.fromkeys(("min_rows", "max_rows", "min_cols", "max_cols"), 1)  # for the start and another end
    (said,) = source("shortest_path", options=one_cell).check()
    assert "no new question for 2 s; change data.options" in said


def test_several_data_sets_are_a_mixture() -> None:
    kinds = {name: {"kind": "reasoning_gym", "name": name, **SIZES} for name in ("chain_sum", "leg_counting")}
    mixture = Mixture(Mixture.Config(sources=kinds), 0)
    problems, _ = mixture.load("train")
    assert len(problems) == 40 and {problem.id.partition("/")[0] for problem in problems} == set(kinds)
    assert {COLUMN, "answer"} <= mixture.provides()
    assert all(judged(problem, f"<answer>{problem.answer}</answer>")[0].value == 1.0 for problem in problems)


def test_more_questions_than_there_are() -> None:
    with pytest.raises(DataError, match=r"only \d+ different train questions .* fewer than 5000 \(data.train_problems"):
        source("coin_flip", train_problems=5000).load("train")


def test_an_answer_at_which_the_package_raises_is_wrong() -> None:
    drawn = source("boxnet")
    (problem, *_) = drawn.preview("train")
    assert drawn.provides() == {COLUMN}, "no answers"
    assert judged(problem, "<answer>42</answer>")[0].value == 0.0


def test_groups_are_judged_in_processes_and_a_prompt_of_other_data_is_invalid() -> None:
    (problem, *_) = source("chain_sum").preview("train")
    texts = (f"<answer>{problem.answer}</answer>", f"{problem.answer}")
    samples = tuple(make_sample(index, text) for index, text in enumerate(texts))
    reward = ReasoningGymReward(ReasoningGymReward.Config(), RewardContext())
    reward.start()
    try:
        known, other = reward.score(
            [Group("g", prompt_of(problem), samples), Group("h", Prompt("a", (), (1,)), samples)]
        )
    finally:
        reward.close()
    assert [score.value for score in known.samples] == [1.0, 0.0]
    assert not any(score.valid for score in other.samples)
    assert ReasoningGymReward.traits(None).columns == (COLUMN,)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("n_queens", "[[chr(81) for _ in range(4)]]"), ("countdown", "exec(chr(49))"), ("simple_integration", "ℯxec(x)")],
)
def test_an_answer_that_would_run_code_is_wrong_and_does_not_run(name: str, answer: str) -> None:
    (problem, *_) = source(name).preview("train")
    column = problem.columns[COLUMN]
    assert not names_mathematics_alone(answer)
    assert score_answer(column, answer) == 0.0


@pytest.mark.parametrize("name", ["binary_matrix", "intermediate_integration", "n_queens", "polynomial_multiplication",
                                  "simple_integration", "spiral_matrix", "string_insertion"])  # fmt: skip
def test_right_answers_name_mathematics_alone(name: str) -> None:
    for problem in source(name).preview("train"):
        assert problem.answer is not None
        assert score_answer(problem.columns[COLUMN], problem.answer) == 1.0


def test_another_try() -> None:
    (problem, *_) = source("chain_sum").preview("train")
    environment = ReasoningGym(ReasoningGym.Config(), EnvironmentContext())
    environment.reset(Task(problem.id, problem.messages, problem.answer, (), problem.columns), 0)
    none, wrong, partly, again, right = act(
        environment,
        f"{problem.answer}",
        "<answer>0.5</answer>",
        f"<answer>is {problem.answer}</answer>",
        f"<answer>is {problem.answer}</answer>",
        f"Then <answer>{problem.answer}</answer>",
    )
    assert none.observation == "There is no answer between <answer> and </answer>. Try again."
    assert wrong.observation == "That is not right. Try again."
    assert 0 < partly.reward < 1 and str(partly.observation).startswith("That is not quite right: it scores 0.")
    assert again.reward == 0, "the same again earns nothing"
    assert right.done and right.success and partly.reward + right.reward == pytest.approx(1)
