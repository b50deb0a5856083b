"""OPO, GPG, MaxRL, Pass@k and GDPO: worked numbers, sums over all subsets or outcomes, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from learner_fixture import make_groups
from pydantic import ValidationError

from algorithms.base import Advantages, Experience
from algorithms.functional.advantages import Outcomes, group_relative
from algorithms.functional.estimators import (
    decoupled,
    group_policy_gradient,
    length_weighted,
    mean_normalised,
    pass_at_k,
)
from algorithms.gdpo import GDPO
from algorithms.grpo import GRPO
from rlkit.experience import Group, GroupScores, Score, UserError


def of_one_group(*rewards: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array(rewards, dtype=np.float64), np.ones(len(rewards), np.bool_), np.zeros(len(rewards), np.int64)


# -- OPO -----------------------------------------------------------------------------------------------------


def test_opo_weighs_the_baseline_by_length() -> None:
    advantages, keep = length_weighted(*of_one_group(1.0, 0.0, 0.0), np.array([10, 20, 30]))
    np.testing.assert_allclose(advantages, [5 / 6, -1 / 6, -1 / 6], atol=1e-12)
    assert keep.all()


def test_opos_baseline_has_the_least_variance_if_squared_gradients_grow_with_length() -> None:
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=12), rng.integers(1, 50, 12)
    advantages, _ = length_weighted(*of_one_group(*rewards), lengths)
    best = rewards[0] - advantages[0]

    def variance(baseline: float) -> float:
        return float((lengths * (rewards - baseline) ** 2).sum())

    assert all(variance(best) < variance(best + shift) for shift in (-0.01, 0.01))


def test_opo_ignores_invalid_samples_and_equal_groups() -> None:
    rewards, valid = np.array([1.0, 0.0, 9.0, 5.0, 5.0, 7.0]), np.array([True, True, False, True, True, True])
    group, lengths = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 3, 100, 2, 4, 1])
    advantages, keep = length_weighted(rewards, valid, group, lengths)
    assert advantages.tolist() == [0.75, -0.25, 0.0, 0.0, 0.0, 0.0]
    assert keep.tolist() == [True, True, False, True, True, False]


# -- GPG -----------------------------------------------------------------------------------------------------


def test_gpg_makes_up_for_groups_with_equal_rewards() -> None:
    rewards = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 9.0])
    valid, group = np.array([True] * 6 + [False]), np.array([0, 0, 1, 1, 2, 2, 2])
    advantages, keep = group_policy_gradient(rewards, valid, group, normalize_by_std=False)
    np.testing.assert_allclose(advantages, [1.5, -1.5, 0, 0, 0, 0, 0])  # alpha = 6 / (6 - 4)
    assert keep.tolist() == [True] * 6 + [False]
    by_std, _ = group_policy_gradient(rewards, valid, group, normalize_by_std=True)
    np.testing.assert_allclose(by_std[:2], [3 / math.sqrt(2), -3 / math.sqrt(2)], rtol=1e-5)
    nothing, keep = group_policy_gradient(*of_one_group(2.0, 2.0), normalize_by_std=False)
    assert not nothing.any() and keep.all()


# -- MaxRL ---------------------------------------------------------------------------------------------------


def test_maxrl_divides_by_the_mean() -> None:
    advantages, keep = mean_normalised(*of_one_group(1.0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(advantages, [3.0, -1.0, -1.0, -1.0])
    assert keep.all()
    for equal in (0.0, 1.0):
        advantages, keep = mean_normalised(*of_one_group(equal, equal))
        assert advantages.tolist() == [0.0, 0.0] and keep.all()


@pytest.mark.parametrize("samples", [2, 4, 7])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_maxrl_has_the_expected_gradient_of_a_truncated_likelihood(samples: int, p: float) -> None:
    """Of a policy that is right with probability p, over all outcomes: d/dp of -sum_k (1 - p)^k / k over k < N."""
    expected = 0.0
    for right in range(samples + 1):
        rewards = [1.0] * right + [0.0] * (samples - right)
        advantages, _ = mean_normalised(*of_one_group(*rewards))
        score = np.array([1 / p] * right + [-1 / (1 - p)] * (samples - right))
        chance = math.comb(samples, right) * p**right * (1 - p) ** (samples - right)
        expected += chance * float((advantages * score).mean())
    assert expected == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, samples)), rel=1e-9)


def test_maxrl_refuses_a_reward_below_zero() -> None:
    with pytest.raises(
        UserError, match=r"divides by the mean reward of a group, and one sample has the reward -0\.5: use a reward"
    ):
        mean_normalised(*of_one_group(1.0, -0.5))
    rewards, valid, group = of_one_group(1.0, 0.0, -3.0)
    valid[2] = False
    assert mean_normalised(rewards, valid, group)[0].tolist() == [1.0, -1.0, 0.0]


# -- pass@k --------------------------------------------------------------------------------------------------


def pass_at_k_by_hand(rewards: list[float], k: int, by_std: bool) -> np.ndarray:
    subsets = list(combinations(range(len(rewards)), k))
    best = np.array([max(rewards[i] for i in subset) for subset in subsets])
    mine = [np.mean([b for b, subset in zip(best, subsets, strict=True) if i in subset]) for i in range(len(rewards))]
    return (np.array(mine) - best.mean()) / (best.std() + 1e-6 if by_std else 1.0)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "rewards",
    [[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0.3, -1.2, 0.3, 4.0, 0.0, 2.5], [2.0, 2.0, -1.0, 0.5, 2.0, 0.5]],
)
def test_pass_at_k_is_the_mean_over_all_subsets(rewards: list[float], k: int, by_std: bool) -> None:
    advantages, keep = pass_at_k(*of_one_group(*rewards), k=k, normalize_by_std=by_std)
    np.testing.assert_allclose(advantages, pass_at_k_by_hand(rewards, k, by_std), atol=1e-9)
    assert keep.all()
    if sum(reward == max(rewards) for reward in rewards) > len(rewards) - k:
        assert not advantages.any(), "rounding noise over epsilon"


def test_pass_at_k_as_published_for_right_and_wrong() -> None:
    """n = 4, k = 2, one right: 1 - C(3,2)/C(4,2) = 1/2, std 1/2; wrong: (1 - 1/2 - C(2,1)/C(3,1)) / (1/2)."""
    advantages, _ = pass_at_k(*of_one_group(0.0, 1.0, 0.0, 0.0), k=2, normalize_by_std=True)
    np.testing.assert_allclose(advantages, [-1 / 3, 1.0, -1 / 3, -1 / 3], atol=1e-5)


def test_pass_at_1_is_grpo_with_the_groups_own_std() -> None:
    rewards = [0.3, -1.2, 0.7, 4.0]
    advantages, _ = pass_at_k(*of_one_group(*rewards), k=1, normalize_by_std=True)
    np.testing.assert_allclose(advantages, (rewards - np.mean(rewards)) / (np.std(rewards) + 1e-6), atol=1e-9)


def test_pass_at_k_leaves_out_groups_with_too_few_samples() -> None:
    rewards, valid = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]), np.array([True, True, False, True, True, True])
    advantages, keep = pass_at_k(rewards, valid, np.array([0, 0, 0, 1, 1, 1]), k=3, normalize_by_std=True)
    assert keep.tolist() == [False] * 3 + [True] * 3
    assert not advantages.any()  # one subset: its samples are as good as each other
    _, keep = pass_at_k(rewards, valid, np.array([0, 0, 0, 1, 1, 2]), k=1, normalize_by_std=True)
    assert keep.tolist() == [True, True, False, True, True, False]


# -- GDPO ----------------------------------------------------------------------------------------------------


def test_gdpo_tells_combinations_apart_that_grpo_does_not() -> None:
    """The paper's example: (0, 1) and (0, 2) against (0, 0) have the same normalised sum."""
    components = np.array([[0, 1], [0, 0], [1, 1], [0, 0]], dtype=np.float64)
    valid, group = np.ones(4, np.bool_), np.array([0, 0, 1, 1])
    grpo, _ = group_relative(components.sum(axis=1), valid, group, normalize_by_std=True)
    assert grpo[0] == pytest.approx(grpo[2], rel=1e-5)
    gdpo, keep = decoupled(components, np.ones(2), valid, group)
    # z = 1/sqrt(2) for each component that differs: sums 1, -1, 2, -2 times that, whose std with ddof 1 is sqrt(10/3)
    np.testing.assert_allclose(gdpo, np.array([1, -1, 2, -2]) / math.sqrt(10 / 3), rtol=1e-4)
    assert keep.all()


def test_gdpo_by_hand_with_weights_and_invalid_samples() -> None:
    rng = np.random.default_rng(4)
    components, weights = rng.normal(size=(12, 3)) * [1, 100, 0.01], np.array([1.0, 0.5, -2.0])
    components[4:8] = 3.0  # equal in everything
    valid, group = rng.random(12) < 0.9, np.repeat([0, 1, 2], 4)
    valid[0] = False
    total = np.zeros(12)
    for g in range(3):
        mine = (group == g) & valid
        values = components[mine]
        total[mine] = ((values - values.mean(0)) / (values.std(0, ddof=1) + 1e-6)) @ weights
    expected = np.where(valid, (total - total[valid].mean()) / (total[valid].std(ddof=1) + 1e-6), 0.0)
    advantages, keep = decoupled(components, weights, valid, group)
    np.testing.assert_allclose(advantages, expected, atol=1e-9)
    assert not advantages[4:8].any() and (keep == valid).all()


def scored(group: Group, *components: dict[str, float]) -> Group:
    return group.with_scores(GroupScores(tuple(Score(sum(part.values()), components=part) for part in components)))


def components_step() -> Experience:
    first, second = (replace(group, samples=group.samples[:2]) for group in make_groups(count=2))
    right, wrong = {"correct": 1.0, "format": 1.0, "length": 9.0}, {"correct": 0.0, "format": 0.0, "length": 3.0}
    return Experience([scored(first, {**wrong, "format": 1.0}, wrong), scored(second, right, wrong)], step=1)


def test_gdpo_reads_the_components_it_is_given() -> None:
    credit = GDPO(GDPO.Config(components={"correct": 1, "format": 1})).advantages(components_step())
    np.testing.assert_allclose(
        [row[0] for row in credit.tokens], np.array([1, -1, 2, -2]) / math.sqrt(10 / 3), rtol=1e-4
    )
    only = GDPO(GDPO.Config(components={"correct": 1})).advantages(components_step())
    assert [bool(row.any()) for row in only.tokens] == [False, False, True, True] and only.keep.all()


def test_gdpo_names_a_component_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match=r"a response to prompt .* has no component formt; it has correct, format, length"
    ):
        GDPO(GDPO.Config(components={"correct": 1, "formt": 1})).advantages(components_step())


def test_gdpo_asks_nothing_of_invalid_samples() -> None:
    step = components_step()
    scores = (Score.invalid("timeout: x"), *[score for _, score in step.groups[0].scored()][1:])
    broken = replace(step, groups=[step.groups[0].with_scores(GroupScores(scores)), step.groups[1]])
    assert GDPO(GDPO.Config(components={"correct": 1})).advantages(broken).keep.tolist() == [False, False, True, True]


# -- settings of GRPO ----------------------------------------------------------------------------------------


def test_each_estimator_is_a_setting_of_grpo() -> None:
    rng = np.random.default_rng(0)
    groups = [
        group.with_scores(GroupScores(tuple(Score(float(reward)) for reward in rng.random(len(group.samples)))))
        for group in make_groups(count=3)
    ]
    experience = Experience(groups, step=1)

    def credit(**options: Any) -> Advantages:
        return GRPO(GRPO.Config(kl_coefficient=0.0, **options)).advantages(experience)

    outcomes = Outcomes.of(experience)
    lengths = np.array([int(mask.sum()) for mask in outcomes.masks])
    samples = (outcomes.rewards, outcomes.valid, outcomes.group)
    for options, (expected, keep) in (
        ({"estimator": "opo"}, length_weighted(*samples, lengths)),
        ({"estimator": "gpg"}, group_policy_gradient(*samples, normalize_by_std=True)),
        ({"estimator": "maxrl"}, mean_normalised(*samples)),
        ({"estimator": "passk", "k": 2}, pass_at_k(*samples, k=2, normalize_by_std=True)),
    ):
        result = credit(**options)
        for row, mask, advantage in zip(result.tokens, outcomes.masks, expected, strict=True):
            np.testing.assert_allclose(row, np.where(mask, advantage, 0.0), rtol=1e-6)
        assert (result.keep == keep).all() and expected.any()


def test_which_estimators_take_the_scale_of_rewards_off() -> None:
    def normalises(**options: Any) -> bool:
        return GRPO(GRPO.Config(**options)).normalises()

    assert normalises() and normalises(estimator="maxrl") and normalises(estimator="passk", k=2)
    assert not normalises(estimator="opo") and not normalises(estimator="gpg", normalize_by_std=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "passk"}, "estimator=passk and k=N go together"),
        ({"k": 2}, "estimator=passk and k=N go together"),
        ({"estimator": "passk", "k": 8}, "k=8 must be below samples_per_prompt=8"),
        ({"estimator": "opo", "normalize_by_std": False}, "normalize_by_std has no effect with estimator=opo"),
        ({"estimator": "maxrl", "normalize_by_std": False}, "normalize_by_std has no effect with estimator=maxrl"),
        ({"estimator": "maxrl", "overlong_max_tokens": 9}, "divides by mean rewards, which penalties"),
        ({"estimator": "maxrl", "kl_in": "reward", "kl_estimator": "k1"}, "divides by mean rewards, which penalties"),
        ({"estimator": "gppo"}, "Input should be 'grpo', 'opo', 'gpg', 'maxrl' or 'passk'"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPO.Config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "components"),
        ({"components": {}}, "at least 1 item"),
        ({"components": {"correct": 1}, "overlong_max_tokens": 9}, "no effect on GDPO"),
        (
            {"components": {"correct": 1}, "kl_coefficient": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
            "no effect on GDPO",
        ),
    ],
)
def test_gdpo_refuses_what_it_does_not_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GDPO.Config(**options)
