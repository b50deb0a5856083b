"""Metrics of a step's groups: what is counted, and what is left out where it would say nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score
from rlkit.experience.buffer import BufferStats
from rlkit.experience.scores import ScoreReport, kind_of, report_on
from rlkit.metrics import rollout_metrics

STATS = BufferStats(version=1, ready=0, in_flight=2, dropped_stale=0, rejected={"drop_equal_rewards": 3})


def group(*rewards: float | None) -> Group:
    """One sample of 2 tokens per reward; None is an invalid one."""
    samples = tuple(
        Sample(i, np.array([3, 4], np.int32), np.zeros(2, np.float32), "a", "stop", (0, 0), seed=i)
        for i in range(len(rewards))
    )
    scores = tuple(Score.invalid("timeout: x") if r is None else Score(r, components={"correct": r}) for r in rewards)
    return Group("g", Prompt("p", (Message("user", "?"),), (1,)), samples, GroupScores(scores))


def measured(*groups: Group, seconds: float = 2.0) -> dict[str, float]:
    return rollout_metrics(groups, [], report_on(groups, 0.5), groups, STATS, seconds)


def test_invalid_scores_are_counted_and_enter_no_mean() -> None:
    metrics = measured(group(1.0, 0.0, None), group(1.0, 1.0, 1.0))
    assert metrics["reward/mean"] == pytest.approx(0.8)
    assert metrics["reward/component/correct"] == metrics["accuracy/train"] == pytest.approx(0.8)
    assert metrics["reward/failed"] == metrics["reward/failed/timeout"] == 1
    assert metrics["group/all_equal_share"] == 0.5
    assert metrics["tokens/per_second"] == 6
    assert metrics["buffer/rejected"] == 3


def test_metrics_are_of_all_judged_groups_and_those_of_the_trained_ones_stand_beside() -> None:
    trained, rejected = [group(1.0, 0.0)], [group(1.0, 1.0), group(1.0, 1.0)]
    stats = replace(STATS, verdicts={"all_right": 2})
    metrics = rollout_metrics(trained, rejected, report_on(trained, 0.0), [*trained, *rejected], stats, 0.0)
    assert metrics["reward/mean"] == metrics["accuracy/train"] == pytest.approx(5 / 6)
    assert metrics["reward/mean_trained"] == 0.5
    assert metrics["group/all_equal_share"] == pytest.approx(2 / 3)
    assert (metrics["buffer/rejected_all_right"], metrics["buffer/rejected_all_wrong"]) == (2, 0)


def test_what_says_nothing_is_left_out() -> None:
    assert "group/all_equal_share" not in measured(group(1.0), group(0.0)), "one sample equals itself"
    nothing = measured(group(None, None), seconds=0.0)
    assert not {"reward/mean", "accuracy/train", "group/all_equal_share", "tokens/per_second"} & nothing.keys()


def test_labels_of_recorded_responses_are_no_rewards() -> None:
    known = group(1.0, 0.0)
    recorded = replace(known, samples=tuple(replace(sample, logprobs=None) for sample in known.samples))
    unasked = rollout_metrics([recorded], [], ScoreReport(), None, replace(STATS, rejected={}), 0.0)
    assert not {"reward/mean", "reward/std"} & unasked.keys()
    judged = rollout_metrics([recorded], [], report_on([recorded], 0.1), None, replace(STATS, rejected={}), 0.0)
    assert judged["reward/mean"] == 0.5


def test_failures_are_counted_by_reason_and_in_a_combination_by_part() -> None:
    assert kind_of("timeout: no answer within 3 s") == "timeout"
    assert kind_of("timeout: part judge: no answer") == "judge/timeout"
    assert kind_of("exception: partly broken: yes") == "exception"
    assert kind_of("crash") == "crash"
