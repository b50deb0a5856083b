"""`reward=function`: what a plain function is given, and what becomes of what it returns."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.function import FunctionReward
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group, Score, Span, SpanReward
from rlkit.experience.scores import checked_scores, report_on


def reward(name: str, **options: Any) -> FunctionReward:
    instance = FunctionReward(FunctionReward.Config(function=f"reward_functions.{name}", **options), RewardContext())
    instance.start()
    return instance


def values(instance: FunctionReward, *groups: Group) -> list[float | str]:
    return [
        score.reason if score.value is None else score.value
        for scores in instance.score(groups)
        for score in scores.samples
    ]


def with_columns(group: Group, **columns: Any) -> Group:
    return replace(group, prompt=replace(group.prompt, columns=columns))


@pytest.mark.parametrize("name", ["words", "words_later", "Judge.brevity"])
def test_plain_async_and_static_functions(name: str) -> None:
    sign = -1 if name == "Judge.brevity" else 1
    outcomes = values(reward(name), make_group("a", ["one two", "one"]), make_group("b", ["one two three"]))
    assert outcomes == [sign * 2.0, sign * 1.0, sign * 3.0]


def test_chat_gives_messages() -> None:
    assert values(reward("words_of_chat", chat=True), make_group("a", ["one two", ""])) == [2.0, 0.0]


def test_columns_by_name() -> None:
    instance = reward("equals_solution")
    assert instance.traits(instance.config).columns == ("solution",)
    right = with_columns(make_group("a", ["x", "y"]), solution="x", other=3)
    lacking = make_group("b", ["x"])
    assert values(instance, right, lacking)[:2] == [1.0, 0.0]
    (reason,) = values(instance, lacking)
    assert str(reason).startswith("no_column: reward_functions.equals_solution needs solution")


def test_token_ids_and_answers() -> None:
    instance = reward("length_of_ids")
    assert instance.traits(instance.config).answer
    assert not instance.traits(instance.config).references
    assert values(instance, make_group("a", ["one two", "one"])) == [2.0, 1.0]
    assert str(values(instance, make_group("a", ["x"], answer=None))[0]).startswith("no_column: ")


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("None", "wrong_type: reward_functions.as_told returned NoneType None, not a list of 2 numbers"),
        ("a string", "wrong_type: reward_functions.as_told returned str '1.0', not a list"),
        ("a number", "wrong_type: reward_functions.as_told returned float 1.0, not a list"),
        ("wrong length", "wrong_length: reward_functions.as_told returned 1 values for 2 completions"),
    ],
)
def test_a_wrong_result_makes_all_samples_invalid(order: str, reason: str) -> None:
    outcomes = values(reward("as_told"), make_group("a", [order, "fine"]))
    assert all(str(text).startswith(reason) for text in outcomes)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("nan inside", "not_finite: reward_functions.as_told returned nan"),
        ("infinity inside", "not_finite: reward_functions.as_told returned inf"),
        ("None inside", "none: reward_functions.as_told returned None for this sample"),
        ("a string inside", "wrong_type: reward_functions.as_told returned str '1.0' instead of a number"),
        ("a list inside", "wrong_type: reward_functions.as_told returned list [1.0] instead of a number"),
    ],
)
def test_a_wrong_value_makes_its_sample_invalid(order: str, reason: str) -> None:
    assert values(reward("as_told"), make_group("a", [order, "fine"])) == [reason, 4.0]


def test_a_text_at_which_the_function_raises_costs_its_own_sample_only() -> None:
    instance = reward("hates_bad")
    groups = [make_group("a", ["1", "bad", "4444"]), make_group("b", ["22"])]
    scores = [score for scored in instance.score(groups) for score in scored.samples]
    assert [score.value for score in scores] == [1.0, None, 0.25, 0.5]
    assert scores[1].reason == "exception: ZeroDivisionError: float division by zero"
    assert scores[1].trace.startswith("Traceback") and "in hates_bad" in scores[1].trace
    report = report_on(checked_scores(groups, instance.score(groups)), 0.0)
    assert list(report.tracebacks.values()) == [scores[1].trace]


def test_a_line_that_raises_is_shown_once_whatever_its_message_says_of_each_text() -> None:
    instance = reward("spelled_out")
    first = report_on(instance.score([make_group("a", ["1", "one", "two\n\nthree", "inf"])]), 0.0).tracebacks
    of_one, of_inf = first.values()
    assert of_one.endswith("could not convert string to float: 'one'\n")
    assert of_inf.endswith("cannot convert float infinity to integer\n") and "'one'" not in of_inf
    later = report_on(instance.score([make_group("b", ["four", "5"])]), 0.0)
    assert set(later.tracebacks) < set(first), "a later step has nothing new to say"


def test_a_function_that_raises_at_every_text_fails_as_a_whole() -> None:
    with pytest.raises(ZeroDivisionError):
        reward("hates_bad").score([make_group("a", ["bad", "bad"])])
    with pytest.raises(ZeroDivisionError):
        reward("hates_bad").score([make_group("a", ["bad"])])


def test_numbers_of_numpy_are_numbers() -> None:
    assert values(reward("as_told"), make_group("a", ["numpy numbers", "fine"])) == [13.0, 4.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("reward_functions.word", "reward_functions has no word"),
        ("no_such_module.words", "there is no module no_such_module"),
        ("words", "must be a dotted path, like my_module.my_function"),
        ("reward_functions.NOT_A_FUNCTION", "is a int, not a function"),
        ("reward_functions.Judge", "is a class; name a Reward class with reward._target_=reward_functions.Judge"),
        ("reward_functions.by_position", "takes completions by position only"),
        ("reward_functions.no_completions", "has no argument `completions`"),
    ],
)
def test_what_is_no_reward_function_is_found_before_the_run(function: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["reward=function", f"reward.function={function}", f"run_dir={tmp_path / 'run'}"])
    (problem,) = error.value.problems
    assert said in str(problem)


def test_columns_that_the_data_lacks_are_found_before_the_run(tmp_path: Path) -> None:
    arguments = ["reward=function", "reward.function=reward_functions.equals_solution", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="FunctionReward needs solution with every prompt"):
        load_config(arguments)
    resolved = load_config(["reward=function", "reward.function=reward_functions.words", f"run_dir={tmp_path / 'run'}"])
    assert resolved.reward_class is FunctionReward


def test_the_contract_can_be_run_against_a_users_function(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("def brevity(completions):\n    return [-len(c) for c in completions]\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(repository)]),
        "REWARD": "rewards.function.FunctionReward",
        "REWARD_OPTIONS": '{"function": "my_rewards.brevity"}',
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not ray"]
    command.append(str(repository / "tests" / "contract"))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_a_number_for_each_step() -> None:
    instance = reward("lengths_of_steps", per_step=True)
    traits = instance.traits(instance.config)
    assert traits.process_rewards and traits.steps and not traits.outcome_rewards
    texts = ["ab cd", "a string", "None", "a number", "nan inside", "too few"]
    steps = [[(0, 1, "ab "), (1, 2, "cd")], *[[(0, 1, text)] for text in texts[1:]]]
    plain = make_group("a", texts)
    samples = [
        replace(sample, spans=tuple(Span(start, end, data={"text": text}) for start, end, text in parts))
        for sample, parts in zip(plain.samples, steps, strict=True)
    ]
    (scores,) = instance.score([replace(plain, samples=tuple(samples))])
    assert scores.samples[0] == Score(None, span_rewards=(SpanReward(0, 1, -3.0), SpanReward(1, 2, -2.0)))
    reasons = [score.reason.partition(":")[0] for score in scores.samples[1:]]
    assert reasons == ["wrong_type", "none", "wrong_type", "not_finite", "wrong_length"]
    (unsplit,) = instance.score([make_group("b", ["one"])])
    assert unsplit.samples[0].reason.startswith("wrong_length: ")
