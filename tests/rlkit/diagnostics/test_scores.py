"""Distances and accuracies of rewards, against worked numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reward_samples import make_group

from rlkit.diagnostics.base import StepRecord
from rlkit.diagnostics.scores import RewardGap, Starc, pair_accuracy, starc
from rlkit.experience import Group, GroupScores, Score

R1 = [np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0])]


@pytest.mark.parametrize(
    ("other", "distance", "angle"),
    [
        ([2 * R1[0] + 7, 2 * R1[1] - 3], 0.0, 0.0),  # scale, and a constant per prompt
        ([np.array([3.0, 2.0, 1.0]), R1[1]], 0.866025, 0.666667),
        ([-R1[0], -R1[1]], 1.0, 1.0),
        ([np.zeros(3), np.zeros(3)], 0.5, 0.5),  # zero stays zero
    ],
)
def test_the_worked_numbers_of_starc(other: list[np.ndarray], distance: float, angle: float) -> None:
    assert starc(R1, other) == pytest.approx((distance, angle), abs=1e-6)
    assert starc(other, R1) == pytest.approx((distance, angle), abs=1e-6)


def test_a_monotone_transform_of_each_prompt_is_still_another_reward() -> None:
    distance, _ = starc(R1, [np.tanh(R1[0]), np.tanh(R1[1])])
    assert 0.01 < distance < 0.5


def test_the_worked_numbers_of_pair_accuracies() -> None:
    """Explicit (1, 1, 0, 1) = 0.75, implicit (1, 0, tie, 1) = 0.625: gap 0.125."""
    truth = np.array([1.0, 0.0])
    explicit = [(2.0, 1.0), (2.0, 1.0), (1.0, 2.0), (2.0, 1.0)]
    implicit = [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0), (2.0, 1.0)]

    def accuracy(pairs: list[tuple[float, float]]) -> float:
        counts = [pair_accuracy(np.array(pair), truth) for pair in pairs]
        return sum(right for right, _ in counts) / sum(pairs for _, pairs in counts)

    assert accuracy(explicit) == 0.75
    assert accuracy(implicit) == 0.625
    assert pair_accuracy(np.array([3.0, 1.0, 2.0, 9.0]), np.array([1.0, 0.0, 1.0, 0.0])) == (2.0, 4)
    record = step([group(p, [1.0, 0.0], "near") for p in explicit] + [group(p, [1.0, 0.0], "far") for p in implicit])
    findings = RewardGap(RewardGap.Config(column="set", min_pairs=4), {}).check(record)
    assert findings.scalars == {"reward_gap/accuracy": 5.5 / 8, "reward_gap/gap": 0.125}
    assert findings.table == [
        {"set": "far", "pairs": 4, "accuracy": 0.625},
        {"set": "near", "pairs": 4, "accuracy": 0.75},
    ]
    assert "in 62% of the pairs of far, and in 75% of those of near" in findings.warning


Judged = tuple[Group, Group]


def group(
    rewards: Sequence[float | None], correct: Sequence[float | None], tag: str = "", components: Any = None
) -> Judged:
    """As the run's reward scores it, and as the verifier does; None is invalid."""
    asked = make_group(f"g{rewards}{tag}", [f"answer {i}" for i in range(len(rewards))])
    asked = replace(asked, prompt=replace(asked.prompt, columns={"set": tag}))

    def scored(values: Sequence[float | None], parts: Any) -> Group:
        scores = [
            Score.invalid("timeout") if value is None else Score(value, components={k: v[i] for k, v in parts.items()})
            for i, value in enumerate(values)
        ]
        return asked.with_scores(GroupScores(tuple(scores)))

    return scored(rewards, components or {}), scored(correct, {"correct": correct})


def step(groups: Sequence[Judged], number: int = 1, rejected: int = 0) -> StepRecord:
    ours, theirs = [ours for ours, _ in groups], [theirs for _, theirs in groups]
    trained = len(ours) - rejected
    return StepRecord(number, groups=ours[:trained], rejected=ours[trained:], judged=theirs)


def test_rejected_groups_count_and_samples_without_a_score_do_not() -> None:
    groups = [group([3.0, None, 1.0, 5.0], [1.0, 1.0, 0.0, None]), group([1.0, 2.0], [1.0, 0.0])]
    findings = RewardGap(RewardGap.Config(), {}).check(step(groups, rejected=1))
    assert findings.table == [{"set": "all", "pairs": 2, "accuracy": 0.5}]


def test_a_reward_no_better_than_chance_is_reported_once_per_window() -> None:
    diagnostic = RewardGap(RewardGap.Config(steps=3, min_pairs=2), {})
    wrong = [group([0.0, 1.0], [1.0, 0.0])]
    said = [bool(diagnostic.check(step(wrong, number)).warning) for number in range(1, 9)]
    assert said == [False, True, False, False, True, False, False, True]


def test_restored_windows_go_on_as_if_they_had_not_stopped() -> None:
    rng = np.random.default_rng(0)
    records = [
        step([group(rng.normal(size=4).tolist(), [1.0, 0.0, 0.0, 1.0], f"{s % 2}") for s in range(3)], i)
        for i in range(8)
    ]
    for kind, config in (
        (RewardGap, RewardGap.Config(column="set", steps=3, min_pairs=1)),
        (Starc, Starc.Config(steps=2)),
    ):
        whole, first, second = (kind(config, {}) for _ in range(3))
        said = [whole.check(record) for record in records]
        for record in records[:4]:
            first.check(record)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.check(record) for record in records[4:]] == said[4:]


def test_starc_of_a_step_against_the_verifier_and_against_a_component() -> None:
    groups = [group([3.0, 1.0], [1.0, 0.0], components={"unshaped": [1.0, 3.0]})]
    findings = Starc(Starc.Config(), {}).check(step(groups))
    assert findings.scalars == pytest.approx({"starc/distance": 0.0, "starc/angle": 0.0}, abs=1e-6)
    findings = Starc(Starc.Config(against="unshaped"), {}).check(step(groups))
    assert findings.scalars == pytest.approx({"starc/distance": 1.0, "starc/angle": 1.0}, abs=1e-6)
    findings = Starc(Starc.Config(against="unshapen"), {}).check(step(groups))
    assert "unshapen among its components (unshaped)" in findings.warning


def test_unrelated_rewards_are_reported() -> None:
    diagnostic = Starc(Starc.Config(steps=2), {})
    against = [group([1.0, 0.0], [0.0, 1.0])]
    said = [diagnostic.check(step(against, number)).warning for number in range(1, 6)]
    assert [bool(text) for text in said] == [False, False, False, True, False]
    assert "mean distance 1.00" in said[3]


@pytest.mark.parametrize("kind", [RewardGap, Starc])
def test_a_run_without_a_verifier_at_work_is_told(kind: type[RewardGap] | type[Starc]) -> None:
    record = replace(step([group([1.0, 0.0], [1.0, 0.0])]), judged=None)
    assert "nothing to compare" in kind(kind.Config(), {}).check(record).warning
