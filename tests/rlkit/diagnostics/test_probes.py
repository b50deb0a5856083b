"""Responses without content: their rate of acceptance, and a real judge with and without its guard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from judge_fixture import JudgeServer, Reply, started, verdict
from reward_samples import make_group

from rlkit.diagnostics.base import StepRecord
from rlkit.diagnostics.probes import MASTER_KEYS, JudgeFalsePositives, false_positive_rates
from rlkit.experience import Group, GroupScores, Score

QUESTIONS = [replace(make_group("q", []).prompt, id=str(i)) for i in range(9)]


def diagnostic(**options: Any) -> JudgeFalsePositives:
    return JudgeFalsePositives(JudgeFalsePositives.Config(**options), {})


def test_the_worked_number_of_a_false_positive_rate() -> None:
    verdicts = [("Solution", yes) for yes in (True, False, False, True)]
    assert false_positive_rates([*verdicts, (":", False)]) == {"Solution": 0.5, ":": 0.0}


def test_probes_come_before_training_and_every_n_steps() -> None:
    probing = diagnostic(every_steps=3, questions=2)
    assert [bool(probing.probes(step, QUESTIONS)) for step in range(7)] == [True, False, False] * 2 + [True]
    groups = probing.probes(0, QUESTIONS)
    assert len(groups) == 2 * len(MASTER_KEYS)
    assert [sample.text for sample in groups[0].samples] == ["6 * 7 = 42\n#### 42", MASTER_KEYS[0]]
    only_once = diagnostic(every_steps=0)
    assert [bool(only_once.probes(step, QUESTIONS)) for step in range(4)] == [True, False, False, False]


def judged(groups: Sequence[Group], values: Sequence[float | None]) -> list[Group]:
    scores = [Score.invalid("timeout: no answer") if value is None else Score(value) for value in values]
    return [
        group.with_scores(GroupScores((*[Score(1.0)] * (len(group.samples) - 1), score)))
        for group, score in zip(groups, scores, strict=True)
    ]


def test_the_worst_and_the_mean_rate_are_metrics_and_all_are_in_the_table() -> None:
    probing = diagnostic(questions=2, max_rate=0.4)
    groups = probing.probes(0, QUESTIONS)
    values: list[float | None] = [0.0] * len(groups)
    values[0], values[1] = 1.0, None  # ":" on the first question; "." not judged there
    findings = probing.check(StepRecord(0, probed=judged(groups, values)))
    assert findings.scalars == pytest.approx({"judge_fpr/max": 0.5, "judge_fpr/mean": 0.5 / len(MASTER_KEYS)})
    assert {row["probe"]: row["false_positive_rate"] for row in findings.table}.keys() == set(MASTER_KEYS)
    assert "(':' on 50% of the questions)" in findings.warning
    assert diagnostic(max_rate=0.5).check(StepRecord(0, probed=judged(groups, values))).warning == ""
    nothing = diagnostic().check(StepRecord(0, probed=judged(groups, [None] * len(groups))))
    assert "timeout: no answer" in nothing.warning


@pytest.mark.parametrize("mode", ["pointwise", "pairwise", "listwise"])
def test_a_guard_rejects_what_a_judge_that_likes_everything_accepts(mode: str) -> None:
    with JudgeServer() as server:
        server.judge = lambda asked: Reply(json.dumps(verdict(asked, likes=lambda _: True)))
        probing = diagnostic(questions=2)
        groups = probing.probes(0, QUESTIONS)
        rates = {}
        for guard in (True, False):
            reward = started(server, mode=mode, guard=guard)
            scored = [group.with_scores(s) for group, s in zip(groups, reward.score(groups), strict=True)]
            rates[guard] = probing.check(StepRecord(0, probed=scored)).scalars["judge_fpr/max"]
            reward.close()
    assert rates == {True: 0.0, False: 1.0}
