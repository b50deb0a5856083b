"""Metrics of a step's groups: what is counted, and what is left out where it would say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlkit.experience import Episode, Group, GroupScores, Message, Prompt, Sample, Score, Segment, Span
from rlkit.experience.buffer import BufferStats
from rlkit.experience.scores import ScoreReport, kind_of, report_on
from rlkit.metrics import rollout_metrics

STATS = BufferStats(version=1, ready=0, in_flight=2, rejected={"drop_equal_rewards": 3})


def group(*rewards: float | None) -> Group:
    """One sample of 2 tokens per reward; None is an invalid one."""
    samples = tuple(
        Sample(i, np.array([3, 4], np.int32), np.zeros(2, np.float32), "a", "stop", (0, 0), seed=i)
        for i in range(len(rewards))
    )
    scores = tuple(Score.invalid("timeout: x") if r is None else Score(r, components={"correct": r}) for r in rewards)
    return Group("g", Prompt("p", (Message("user", "?"),), (1,)), samples, GroupScores(scores))


def report(groups: Sequence[Group], seconds: float = 0.0) -> ScoreReport:
    return report_on([group.scores for group in groups if group.scores is not None], seconds)


def measured(*groups: Group, seconds: float = 2.0) -> dict[str, float]:
    return rollout_metrics(groups, [], report(groups, 0.5), groups, STATS, seconds)


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
    metrics = rollout_metrics(trained, rejected, report(trained), [*trained, *rejected], stats, 0.0)
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
    judged = rollout_metrics([recorded], [], report([recorded], 0.1), None, replace(STATS, rejected={}), 0.0)
    assert judged["reward/mean"] == 0.5


def test_failures_are_counted_by_reason_and_in_a_combination_by_part() -> None:
    assert kind_of("timeout: no answer within 3 s") == "timeout"
    assert kind_of("timeout: part judge: no answer") == "judge/timeout"
    assert kind_of("exception: partly broken: yes") == "exception"
    assert kind_of("crash") == "crash"


def episode(*turns: bool, ended: str = "done", success: bool | None = None, **more: Any) -> Sample:
    """Turns of 2 tokens (True: with a call that cannot be read) with observations of 3 between them."""
    mask = np.array(([True] * 2 + [False] * 3) * len(turns), np.bool_)[:-3]
    spans = [Span(5 * i, 5 * i + 2, "turn", "assistant", {"malformed": int(bad)}) for i, bad in enumerate(turns)]
    spans += [Span(5 * i + 2, 5 * i + 5, "turn", "user") for i in range(len(turns) - 1)]
    tokens = np.zeros(len(mask), np.int32)
    of = Episode(ended, success=success, **more)  # type: ignore[arg-type]
    return Sample(0, tokens, np.zeros(len(mask), np.float32), "a", "stop", (0, 0), 0, mask, tuple(spans), episode=of)


def test_episodes_are_measured_by_turns_and_broken_ones_only_counted() -> None:
    samples = (
        episode(False, True, success=True, metrics={"moves": 3.0}, seconds=4.0, waited=1.0),
        episode(False, False, False, False, ended="turns", success=False, metrics={"moves": 5.0}),
        episode(True, ended="failed", failure="timeout: no answer", seconds=4.0, waited=3.0),
    )
    scores = (Score(1.0), Score(0.0), Score.invalid("environment: timeout: no answer"))
    metrics = measured(replace(group(1.0), samples=samples, scores=GroupScores(scores)))
    own = {name.removeprefix("environment/"): v for name, v in metrics.items() if name.startswith("environment/")}
    assert own == {
        "turns": 3.0,
        "success": 0.5,
        "malformed_share": pytest.approx(1 / 6),
        "observation_tokens": 6.0,
        "budget_share": 0.5,
        "wait_share": 0.5,
        "failed/timeout": 1.0,
        "metric/moves": 4.0,
    }
    assert metrics["length/mean"] == pytest.approx((4 + 8 + 2) / 3), "observations are not the policy's"
    assert not any(name.startswith("environment/") for name in measured(group(1.0)))
    rows = (Segment(0, 5, np.zeros(3, np.int32)), Segment(5, 7, np.zeros(9, np.int32)))
    several = replace(
        group(1.0), samples=(replace(samples[0], segments=rows), *samples[1:]), scores=GroupScores(scores)
    )
    assert measured(several)["environment/segments"] == 1.5
    assert measured(several)["environment/turns"] == 3.0
