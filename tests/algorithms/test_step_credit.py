"""Forms of step credit: worked numbers of each, what they have in common, and the one view of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from test_pure_and_brpo import group, sample, spans

from algorithms.base import Advantages, Experience
from algorithms.functional.step_credit import leave_one_out_to_go, pooled_z, to_go
from algorithms.ppo import PPO
from algorithms.prime import PRIME
from algorithms.rloo import RLOO
from algorithms.step_credit import StepCredit
from rlkit.experience import Score, Span
from rlkit.experience.steps import process_rewards

GAINS = [(0.204989, 0.201312, 0.0), (0.05, -0.02, 0.0)]
"""Information gains of two turns (IGPO); the outcome 1 or 0 comes in the third."""


def one_token_steps(rewards: list[tuple[float, ...]], outcomes: list[float | None]) -> Experience:
    scores = [
        Score(outcome, span_rewards=spans(*((k, k + 1, value) for k, value in enumerate(row))))
        for row, outcome in zip(rewards, outcomes, strict=True)
    ]
    return group([sample(i, len(row)) for i, row in enumerate(rewards)], scores)


def advantages(experience: Experience, **options: Any) -> Advantages:
    return StepCredit(StepCredit.Config(**{"kl_coefficient": 0.0, **options})).advantages(experience)


def rows(experience: Experience, **options: Any) -> list[list[float]]:
    return [row.tolist() for row in advantages(experience, **options).tokens]


def test_turns_of_igpo_by_z_scores() -> None:
    """Pooled over the group (mean 0.239384, standard deviation 0.385129), summed from each turn on."""
    experience = one_token_steps(GAINS, [1.0, 0.0])
    first, second = rows(experience, credit="turn_discounted")
    assert first == pytest.approx([1.786807, 1.876114, 1.974967], abs=2e-6)
    assert second == pytest.approx([-1.786807, -1.295066, -0.621568], abs=2e-6)
    z = (np.array([0.204989, 0.201312, 1.0]) - 0.239384) / 0.385129
    discounted = [z[0] + 0.5 * z[1] + 0.25 * z[2], z[1] + 0.5 * z[2], z[2]]
    assert rows(experience, credit="turn_discounted", gamma=0.5)[0] == pytest.approx(discounted, abs=4e-6)


def test_turns_of_igpo_by_position() -> None:
    first, second = rows(one_token_steps(GAINS, [1.0, 0.0]), credit="turn_discounted", norm="position_mean")
    assert first == pytest.approx([0.688151, 0.610656, 0.5], abs=1e-6)
    assert second == pytest.approx([-0.688151, -0.610656, -0.5], abs=1e-6)
    longer = one_token_steps([(1.0, 2.0), (3.0,)], [0.0, 0.0])  # nobody else has a second token
    assert rows(longer, credit="turn_discounted", norm="position_mean") == [[0.0, 0.0], [0.0]]


def test_process_supervision_of_grpo() -> None:
    """arXiv 2402.03300 section 4.1.3, as a loop: no outcome is read."""
    rewards: list[tuple[float, ...]] = [(0.1, 0.9, 0.4), (0.5,), (-0.3, 0.2)]
    everything = np.array([value for row in rewards for value in row])
    got = advantages(one_token_steps(rewards, [None, None, 1.0]), credit="turn_discounted", outcome_coefficient=0.0)
    assert got.keep.all()
    for row, tokens in zip(rewards, got.tokens, strict=True):
        normalised = [(value - everything.mean()) / everything.std(ddof=1) for value in row]
        np.testing.assert_allclose(tokens, [sum(normalised[k:]) for k in range(len(row))], atol=1e-6)


def test_the_two_levels_of_oprl() -> None:
    """Turn log-probs under the reward model (-3, -2, -4), before (-4, -2.5, -3), beta 0.05; pooled with a second
    response."""
    ratios = 0.05 * (np.array([-3.0, -2.0, -4.0]) - np.array([-4.0, -2.5, -3.0]))
    first, second = pooled_z([ratios, np.array([0.02, -0.01])], np.ones(2, bool), np.zeros(2, np.int64), ddof=0)
    np.testing.assert_allclose(first, [1.253905, 0.524891, -1.662154], atol=1e-6)
    np.testing.assert_allclose(second, [0.379088, -0.495730], atol=1e-6)
    experience = one_token_steps([tuple(ratios), (0.02, -0.01)], [1.0, 0.0])
    episode = 0.5 / (np.sqrt(0.5) + 1e-6)
    got = rows(experience, credit="episode_plus_step", process_coefficient=0.5)
    assert got[0] == pytest.approx(episode + 0.5 * first, abs=1e-6)
    assert got[1] == pytest.approx(-episode + 0.5 * second, abs=1e-6)


def test_leave_one_out_of_returns() -> None:
    """Against the others' reward-to-go at the same step, which is 0 for those that have ended."""
    rewards: list[tuple[float, ...]] = [(1.0, 2.0, 4.0), (3.0, 1.0), (5.0,)]
    returns = [[7.0, 6.0, 4.0], [4.0, 1.0, 0.0], [5.0, 0.0, 0.0]]
    got = rows(one_token_steps(rewards, [None] * 3), credit="loo", outcome_coefficient=0.0)
    for i, row in enumerate(got):
        first, second = (returns[j] for j in range(3) if j != i)
        assert row == pytest.approx([returns[i][k] - (first[k] + second[k]) / 2 for k in range(len(row))])


def test_leave_one_out_of_outcomes_is_rloo() -> None:
    """The same on every step; outcomes 1, 0, 1, 1 as in SPA's released script."""
    outcomes: list[float | None] = [1.0, 0.0, 1.0, 1.0]
    experience = one_token_steps([(0.5, 0.5)] * 4, outcomes)
    expected = [1 / 3, -1, 1 / 3, 1 / 3]
    assert rows(experience, credit="loo") == [pytest.approx([value, value]) for value in expected]
    steps = one_token_steps([(9.0, -1.0), (2.0, 0.0), (3.0, 0.0), (0.0, 7.0)], outcomes)
    assert rows(steps, credit="loo", process_coefficient=0.0) == [
        row.tolist() for row in RLOO(RLOO.Config()).advantages(steps).tokens
    ]


def test_the_baseline_of_loo_pays_nobody_for_more_steps() -> None:
    """Cutting a step that earns nothing into many changes nobody's credit."""
    alike = np.ones(2, bool), np.zeros(2, np.int64)
    whole = leave_one_out_to_go([np.array([1.0, 0.0]), np.array([0.5])], *alike)
    cut = leave_one_out_to_go([np.array([1.0, *[0.0] * 9]), np.array([0.5])], *alike)
    assert whole[0].tolist() == [0.5, 0.0] and cut[0].tolist() == [0.5, *[0.0] * 9]
    assert whole[1].tolist() == cut[1].tolist() == [-0.5]


@pytest.mark.parametrize(
    "options",
    [
        {"credit": "loo"},
        {"credit": "episode_plus_step"},
        {"credit": "turn_discounted", "norm": "position_mean"},
        {"credit": "turn_discounted", "outcome_coefficient": 0.0},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_equal_responses_earn_exactly_nothing_and_are_kept(options: dict[str, Any]) -> None:
    got = advantages(one_token_steps([(0.3, 0.3)] * 3, [0.1] * 3), **options)
    assert got.keep.all() and not np.concatenate(got.tokens).any()


def test_discounted_returns() -> None:
    assert to_go(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    assert to_go(np.zeros(0)).tolist() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit": "loo", "temperature": 0.2}, "temperature has no effect with credit=loo"),
        ({"gamma": 0.9}, "gamma has no effect with credit=min_form"),
        ({"credit": "loo", "normalize_by_std": True}, "normalize_by_std has no effect with credit=loo"),
        ({"credit": "turn_discounted", "norm": "position_mean", "gamma": 0.9}, "no effect with norm=position_mean"),
        ({"process_coefficient": 0.0, "outcome_coefficient": 0.0}, "both 0"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StepCredit.Config(**options)


# -- one view of steps ---------------------------------------------------------------------------------------

STEPS = (Span(0, 3), Span(3, 5), Span(5, 6))
TOKENS = np.array([0.5, 0.25, 100.0, -0.125, 1.0, 2.0], dtype=np.float32)
MASK = np.array([True, True, False, True, True, True])


def told(as_spans: bool, outcome: float | None = 1.0) -> Experience:
    """The same step rewards as rewards of spans, or of the tokens of a response that was split; and a second
    response."""
    first = Score(outcome, span_rewards=spans((0, 3, 0.75), (3, 5, 0.875), (5, 6, 2.0)))
    second = Score(None if outcome is None else 0.0, span_rewards=spans((0, 2, -1.0)))
    if as_spans:
        return group([sample(0, 6, mask=MASK), sample(1, 2)], [first, second])
    by_token = replace(first, span_rewards=(), token_rewards=TOKENS)
    return group([sample(0, 6, mask=MASK, spans=STEPS), sample(1, 2)], [by_token, second])


@pytest.mark.parametrize(
    "algorithm",
    [
        PPO(PPO.Config(gae_lambda=0.9)),
        PRIME(PRIME.Config()),
        PRIME(PRIME.Config(estimator="grpo")),
        *(
            StepCredit(StepCredit.Config(credit=credit, kl_coefficient=0.0))  # type: ignore[arg-type]
            for credit in ("min_form", "loo", "episode_plus_step", "turn_discounted")
        ),
    ],
    ids=lambda algorithm: type(algorithm).__name__ + getattr(algorithm.config, "credit", ""),
)
def test_token_rewards_of_a_split_response_are_rewards_of_its_steps(algorithm: Any) -> None:
    values = [np.zeros(6, np.float32), np.ones(2, np.float32)]
    by_span, by_token = (algorithm.advantages(replace(told(how), values=values)) for how in (True, False))
    for one, other in zip(by_span.tokens, by_token.tokens, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.any()
    assert by_span.metrics == by_token.metrics


def test_prime_reads_the_rewards_of_spans() -> None:
    """A step's reward is on its last trained token; returns are whitened at the end."""
    config = PRIME.Config(estimator="reinforce", normaliser="none", outcome_coefficient=0.0)
    got = PRIME(config).advantages(told(as_spans=True))
    returns = np.array([3.625, 3.625, 2.875, 2.875, 2.0, -1.0, -1.0])
    flat = np.concatenate([got.tokens[0][MASK], got.tokens[1]])
    np.testing.assert_allclose(flat, (returns - returns.mean()) / returns.std(ddof=1), atol=1e-6)


def test_ppo_learns_from_process_rewards_alone() -> None:
    experience = replace(told(as_spans=True, outcome=None), values=[np.zeros(6, np.float32), np.zeros(2, np.float32)])
    got = PPO(PPO.Config(whiten_advantages=False)).advantages(experience)
    assert got.keep.all()
    assert got.tokens[0].tolist() == [3.625, 3.625, 0.0, 2.875, 2.875, 2.0]
    outcomes_only = PPO(PPO.Config(process_coefficient=0.0))
    assert outcomes_only.needs().outcome_rewards and not outcomes_only.advantages(experience).keep.any()


def test_a_score_with_both_kinds_loses_neither() -> None:
    both = Score(None, token_rewards=TOKENS, span_rewards=spans((3, 5, 4.0), (1, 3, 8.0)))
    rewards, where = process_rewards(sample(0, 6, mask=MASK, spans=STEPS), both)
    assert where.tolist() == [[0, 3], [1, 3], [3, 5], [5, 6]]
    assert rewards.tolist() == [0.75, 8.0, 4.875, 2.0]
