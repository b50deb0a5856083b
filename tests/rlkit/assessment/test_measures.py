"""Numbers of an evaluation from its rows: wrong and left out are two numbers, greedy and sampled two lines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rlkit.assessment.measures import differences, lines_of, measured
from rlkit.assessment.report import Findings, results
from rlkit.assessment.rows import answered, causes, read_rows


def rows(
    question: str, values: list[float | None], *, step: int = 0, decoding: str = "sampled", **own: list[Any]
) -> list[dict[str, Any]]:
    """Answers to one question; None was not judged. `own`: further keys, a value for each answer."""
    return [
        {
            "kind": "evaluation",
            "step": step,
            "decoding": decoding,
            "group_id": f"evaluation-{step}-{decoding}-{question}",
            "prompt_id": question,
            "sample": i,
            "group_size": len(values),
            "correct": value,
            "verdict": None,
            "unjudged": "timeout: late" if value is None else None,
            "reward": value,
            "length": 10 + i,
            "finish_reason": "length" if i == 0 else "stop",
            "vote": None,
            **{key: values_of_key[i] for key, values_of_key in own.items()},
        }
        for i, value in enumerate(values)
    ]


def test_what_was_not_judged_is_left_out_and_never_wrong() -> None:
    answers = rows("a", [1.0, None, 0.0, None]) + rows("b", [1.0, 1.0, None, 1.0]) + rows("c", [None] * 4)
    (line,) = lines_of(answers)
    one = measured(line, chooses=False)
    assert one.mean.value == pytest.approx((0.5 + 1.0) / 2), "means of questions, each of its judged answers"
    assert (one.answers, one.wrong, one.left_out, one.mean.questions) == (12, 1, 7, 2)
    assert one.of_k["pass@"][2].value == pytest.approx((1.0 + 1.0) / 2)
    assert one.of_k["pass^"][2].value == pytest.approx((0.0 + 1.0) / 2)
    assert one.of_k["pass@"][3].questions == 1, "of the question with three verdicts alone"
    assert causes(answers) == {"timeout": 7}
    assert one.truncated == pytest.approx(3 / 12)
    assert one.length is not None and one.length.value == pytest.approx(11.5)
    *_, said = Findings([one], (), "Rule", None, causes(answers)).notes()
    assert said == "Columns with fewer questions (the others have too few judged answers): step 0 sampled, k=3: 1 of 2."


def test_greedy_and_sampled_answers_are_lines_of_their_own_and_steps_are_in_order() -> None:
    answers = rows("a", [0.0], step=20, decoding="greedy") + rows("a", [1.0, 0.0], step=20)
    answers += rows("a", [1.0], decoding="greedy") + rows("a", [0.0, 0.0])
    lines = lines_of(answers)
    assert [(line.step, line.decoding) for line in lines] == [
        (0, "sampled"),
        (0, "greedy"),
        (20, "sampled"),
        (20, "greedy"),
    ]
    sampled, greedy = measured(lines[2], False), measured(lines[3], False)
    assert (sampled.headline, sampled.mean.value) == ("accuracy/heldout", 0.5)
    assert (greedy.headline, greedy.mean.value, greedy.of_k) == ("evaluation/greedy/accuracy", 0.0, {})
    assert greedy.metrics()["evaluation/greedy/accuracy"] == 0.0


def test_metrics_have_their_intervals_beside_them() -> None:
    answers = [row for i in range(40) for row in rows(f"q{i}", [float(i % 2), 1.0])]
    metrics = measured(lines_of(answers)[0], False).metrics()
    assert metrics["accuracy/heldout/low"] < metrics["accuracy/heldout"] == 0.75 < metrics["accuracy/heldout/high"]
    assert metrics["evaluation/pass@2"] == 1.0 and metrics["evaluation/pass@2/low"] == pytest.approx(0.912, abs=1e-3)
    assert metrics["evaluation/unjudged"] == 0.0


def test_values_of_any_size_have_a_best_and_no_pass() -> None:
    answers = rows("a", [None, None], verdict=[-3.0, 5.0], unjudged=[None, None])
    one = measured(lines_of(answers)[0], False)
    assert (one.area, one.mean.value, one.wrong) == ("reward", 1.0, 0)
    assert set(one.of_k) == {"best@"} and one.of_k["best@"][2].value == 5.0


def test_an_episode_that_nobody_calls_a_success_is_none_where_others_are_judged_so() -> None:
    answers = rows("a", [1.0, None], ended=["done", "turns"], unjudged=[None, None], verdict=[None, 0.3])
    one = measured(lines_of(answers)[0], False)
    assert (one.mean.value, one.wrong, one.left_out) == (0.5, 1, 0)


def test_a_majority_counts_right_answers_as_one_however_they_are_spelled() -> None:
    answers = rows("a", [1.0, 1.0, 0.0, 0.0, 0.0], vote=["1/2", "0.5", "3", "3", "4"])
    one = measured(lines_of(answers)[0], False)
    assert one.of_k["maj@"][5].value == 0.5, "two right ones and two that say 3 draw lots"
    assert measured(lines_of(rows("a", [1.0, 0.0]))[0], False).of_k.keys() == {"pass@", "pass^"}


def test_the_best_by_a_reward_stands_between_random_and_oracle() -> None:
    answers = rows("a", [1.0, 0.0, 0.0, 0.0], reward=[0.9, 0.1, 0.2, 0.3]) + rows(
        "b", [1.0, 0.0, 0.0, 0.0], reward=[0.1, 0.9, 0.2, 0.3]
    )
    one = measured(lines_of(answers)[0], chooses=True)
    assert (one.mean.value, one.of_k["chosen@"][4].value, one.of_k["pass@"][4].value) == (0.25, 0.5, 1.0)
    assert one.reward is not None and one.reward.value == pytest.approx(0.375)


def test_an_evaluation_that_went_on_counts_each_answer_once(tmp_path: Path) -> None:
    answers = rows("a", [1.0, 0.0])
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*answers, *answers]))
    assert measured(lines_of(read_rows(tmp_path))[0], False).answers == 2
    assert answered(answers) == {(0, "evaluation-0-sampled-a")}
    assert answered(answers[:1]) == set(), "a group whose second answer was not written is asked again"


def test_the_order_of_rows_changes_nothing() -> None:
    answers = [row for i in range(35) for row in rows(f"q{i}", [float(i % 3 == 0), 1.0, None], vote=["1", str(i), "2"])]
    shuffled = list(answers)
    random.Random(3).shuffle(shuffled)
    one, other = (measured(lines_of(some)[0], False) for some in (answers, shuffled))
    assert one.metrics() == other.metrics()


def test_steps_are_compared_question_by_question_and_the_report_names_no_winner_without_one() -> None:
    answers = []
    for i in range(60):
        answers += rows(f"q{i}", [float(i % 2), 0.0])
        answers += rows(f"q{i}", [float(i % 2), float(i % 10 != 0)], step=10)
        answers += rows(f"q{i}", [float(i % 3 == 0), 0.0], step=20)
    first, *others = lines_of(answers)
    compared = [(f"step {first.step}", line, own) for line, own in differences(first, others)]
    assert [own.winner for _, _, own in compared] == ["second", None]
    assert compared[0][2].mean.value == pytest.approx(0.45)
    found = Findings([measured(line, False) for line in (first, *others)], compared, "Rule", None, {})
    text = found.text()
    assert "step 10 sampled" in text.splitlines()[-2] and text.splitlines()[-1].endswith("none")
    assert found.markdown().count("| --- |") == 3
    content = results([found], {"seed": 0}, {"": {"sha256": "x", "questions": 60}})
    assert '"winner": null' in content and '"schema": 1' in content and "NaN" not in content


def test_one_question_has_no_interval_and_the_report_says_so() -> None:
    one = measured(lines_of(rows("a", [1.0, 0.0]))[0], False)
    assert math.isnan(one.mean.low)
    assert "no interval" in Findings([one], (), "Rule", None, {}).text()
