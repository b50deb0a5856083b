"""PURE and BRPO: worked numbers, loops written from the papers, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_fixture import make_groups
from pydantic import ValidationError
from test_grpo import Rows

from algorithms.base import Experience
from algorithms.brpo import BRPO
from algorithms.functional.advantages import Outcomes
from algorithms.functional.step_credit import Steps
from algorithms.ppo import PPO
from algorithms.step_credit import StepCredit
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group, GroupScores, Message, PreferencePair, Prompt, Sample, Score, Span
from rlkit.experience.types import SpanReward


def sample(index: int, length: int, **more: Any) -> Sample:
    logprobs = np.linspace(-1, -2, length).astype(np.float32)
    token_ids = np.arange(length, dtype=np.int32)
    return Sample(index, token_ids, logprobs, "", "stop", (0, 0), seed=index, **more)


def group(samples: list[Sample], scores: list[Score], pairs: tuple[PreferencePair, ...] = ()) -> Experience:
    prompt = Prompt("p", (Message("user", "?"),), (1, 2))
    return Experience([Group("g", prompt, tuple(samples)).with_scores(GroupScores(tuple(scores), pairs))], step=1)


def spans(*rewards: tuple[int, int, float]) -> tuple[SpanReward, ...]:
    return tuple(SpanReward(*reward) for reward in rewards)


# -- PURE ----------------------------------------------------------------------------------------------------

WEIGHTED = np.array([0.8 * 0.000002, -0.5 * 0.999662, 0.3 * 0.000335])
"""Of steps (0.8, -0.5, 0.3) at T = 0.1: cross-checked with the authors' released function."""


def two_responses(first: float | None = 1.0, second: float | None = 0.0) -> Experience:
    """Steps of 2, 1 and 1 tokens with rewards (0.8, -0.5, 0.3), against one step of 2 tokens with reward 0.4; the
    second response has a separator at its end, the first an observation in the middle."""
    mask = np.array([True, True, False, True, True])
    return group(
        [sample(0, 5, mask=mask), sample(1, 3)],
        [
            Score(first, span_rewards=spans((4, 5, 0.3), (0, 3, 0.8), (3, 4, -0.5))),  # in any order
            Score(second, span_rewards=spans((0, 2, 0.4))),
        ],
    )


def test_pure_of_two_responses() -> None:
    experience = two_responses()
    config = StepCredit.Config(outcome_coefficient=0.0, kl_coefficient=0.0)
    process_only = StepCredit(config).advantages(experience)
    to_go = np.cumsum((WEIGHTED - 0.2 * np.array([2, 1, 1]))[::-1])[::-1]
    first = np.array([to_go[0], to_go[0], 0.0, to_go[1], to_go[2]])
    second = np.array([0.4 - 2 * WEIGHTED.sum() / 4] * 2 + [0.0])
    np.testing.assert_allclose(process_only.tokens[0], first, atol=2e-6)
    np.testing.assert_allclose(process_only.tokens[1], second, atol=2e-6)
    assert process_only.metrics["steps/worst"] == pytest.approx((-0.5 + 0.4) / 2)
    assert process_only.metrics["steps/count"] == 2.0

    both = StepCredit(StepCredit.Config(kl_coefficient=0.0)).advantages(experience)  # outcome 1 - 0 and 0 - 1
    np.testing.assert_allclose(both.tokens[0], first + np.array([1, 1, 0, 1, 1]), atol=2e-6)
    np.testing.assert_allclose(both.tokens[1], second - np.array([1, 1, 0]), atol=2e-6)
    assert both.keep.all()


def test_pure_takes_the_kl_from_each_token_on() -> None:
    experience = two_responses()
    policy = [s.logprobs for s in experience.groups[0].samples]
    divergence = [np.array([0.5, -0.25, 9.0, 0.125, 1.0]), np.array([0.0, 0.5, 0.25])]
    measured = replace(
        experience,
        policy_logprobs=policy,
        reference_logprobs=[(p - d).astype(np.float32) for p, d in zip(policy, divergence, strict=True)],
    )
    plain = StepCredit(StepCredit.Config(kl_coefficient=0.0)).advantages(experience)
    penalised = StepCredit(StepCredit.Config(kl_coefficient=0.1)).advantages(measured)
    to_go = [[1.375, 0.875, 0.0, 1.125, 1.0], [0.75, 0.75, 0.0]]  # the observation's 9 is nobody's
    for row, before, cost in zip(penalised.tokens, plain.tokens, to_go, strict=True):
        np.testing.assert_allclose(row, before - 0.1 * np.array(cost), atol=1e-6)
    assert penalised.metrics["kl/reference"] == pytest.approx((1.375 + 0.75) / 7)
    assert StepCredit(StepCredit.Config()).needs().token_kl and StepCredit(StepCredit.Config()).needs().process_rewards


def test_the_baseline_of_pure_is_what_the_others_earn_per_token_together() -> None:
    rewards = [0.5, -0.2, 0.3]
    lengths = [2, 1, 4]
    experience = group(
        [sample(i, n) for i, n in enumerate(lengths)],
        [Score(0.0, span_rewards=spans((0, n, p))) for n, p in zip(lengths, rewards, strict=True)],
    )
    advantages = StepCredit(StepCredit.Config(kl_coefficient=0.0)).advantages(experience)
    for i, row in enumerate(advantages.tokens):
        others = [j for j in range(3) if j != i]
        baseline = sum(rewards[j] for j in others) / sum(lengths[j] for j in others)
        np.testing.assert_allclose(row, rewards[i] - baseline * lengths[i], atol=1e-6)


def test_pure_without_outcomes_needs_none() -> None:
    experience = two_responses(None, None)
    assert not StepCredit(StepCredit.Config(kl_coefficient=0.0)).advantages(experience).keep.any()
    assert StepCredit(StepCredit.Config(kl_coefficient=0.0, outcome_coefficient=0.0)).advantages(experience).keep.all()


def test_steps_of_a_sample() -> None:
    tokens = np.array([0.5, 0.25, 100.0, -0.125], dtype=np.float32)
    mask = np.array([True, True, False, True])
    turns = (Span(0, 2, "turn"), Span(2, 3, "turn", role="tool"), Span(3, 4, "turn"))
    steps = Steps.of(
        group(
            [sample(0, 4, mask=mask), sample(1, 4, mask=mask, spans=turns), sample(2, 4), sample(3, 4)],
            [
                Score(1.0, token_rewards=tokens),
                Score(1.0, token_rewards=tokens),
                Score(1.0, span_rewards=spans((2, 4, 2.0), (0, 1, 1.0))),
                Score.invalid("timeout: test"),
            ],
        )
    )
    assert [row.tolist() for row in steps.rewards] == [[0.5, 0.25, -0.125], [0.75, -0.125], [1.0, 2.0], []]
    assert [row.tolist() for row in steps.spans] == [[[0, 1], [1, 2], [3, 4]], [[0, 2], [3, 4]], [[0, 1], [2, 4]], []]
    assert [row.tolist() for row in steps.inside()[2:]] == [[True, False, True, True], [False] * 4]
    assert [row.tolist() for row in steps.lengths()] == [[1, 1, 1], [2, 1], [1, 2], []]


def test_pure_says_what_it_misses_and_what_would_not_act() -> None:
    with pytest.raises(ValueError, match="group g0, sample 0: this algorithm needs process rewards"):
        StepCredit(StepCredit.Config(kl_coefficient=0.0)).advantages(Experience(make_groups(), step=1))
    with pytest.raises(ValidationError, match="overlong_max_tokens has no effect with outcome_coefficient=0"):
        StepCredit.Config(outcome_coefficient=0.0, overlong_max_tokens=10)


def test_ppo_reads_the_rewards_of_spans() -> None:
    """On the last trained token of each span; with a critic of zeros and gamma = lambda = 1 they add up."""
    experience = replace(two_responses(), values=[np.zeros(5, np.float32), np.zeros(3, np.float32)])
    config = PPO.Config(whiten_advantages=False, process_coefficient=0.5)
    advantages = PPO(config).advantages(experience)
    np.testing.assert_allclose(advantages.tokens[0], [1.3, 1.3, 0.0, 0.9, 1.15], atol=1e-6)
    np.testing.assert_allclose(advantages.tokens[1], [0.2, 0.2, 0.0], atol=1e-6)


# -- BRPO ----------------------------------------------------------------------------------------------------


def compared(pairs: tuple[PreferencePair, ...], rewards: list[float], **options: Any) -> Any:
    """The advantages of samples of one token; seeds make sample 0 the reference."""
    scores = [Score(reward) for reward in rewards]
    experience = group([sample(i, 1) for i in range(len(rewards))], scores, pairs)
    return BRPO(BRPO.Config(**options)).advantages(experience)


def test_brpo_by_preferences() -> None:
    """The specification's example: G = 4, A = (0, 1, -1, 1), skew 0.25. A win in one order only is none."""
    pairs = (
        PreferencePair(1, 0),
        PreferencePair(2, 0, 0.75),
        PreferencePair(3, 0),
        PreferencePair(2, 3),  # not about the reference
    )
    advantages = compared(pairs, [0.9, 0.1, 0.1, 0.1])  # the values say otherwise, and do not count
    assert [float(row[0]) for row in advantages.tokens] == [0.0, 1.0, -1.0, 1.0]
    assert advantages.keep.all()
    assert advantages.metrics["brpo/win_share"] == pytest.approx(2 / 3)
    assert advantages.metrics["brpo/dropped_share"] == 0.0
    lenient = compared(pairs, [0.9, 0.1, 0.1, 0.1], win_probability=0.75, max_skew=0.8)
    assert [float(row[0]) for row in lenient.tokens] == [0.0, 1.0, 1.0, 1.0]


def test_brpo_drops_groups_with_a_reference_that_is_too_good_or_too_bad() -> None:
    """The specification's example: G = 8, A = (1, 0, 1, 1, 1, 1, -1, 1) sums to 5 of 8, above 0.6."""
    pairs = tuple(PreferencePair(i, 0) for i in (1, 2, 3, 4, 5, 7))
    advantages = compared(pairs, [0.5] * 8)
    assert not advantages.keep.any() and not any(row.any() for row in advantages.tokens)
    assert advantages.metrics["brpo/dropped_share"] == 1.0
    assert compared(pairs, [0.5] * 8, max_skew=0.625).keep.all()


def test_brpo_by_rewards_where_nothing_was_compared() -> None:
    advantages = compared((), [0.5, 1.0, 0.0, 0.7, 0.5])
    assert [float(row[0]) for row in advantages.tokens] == [0.0, 1.0, -1.0, 1.0, -1.0]


def test_the_reference_is_a_valid_sample_and_each_is_as_likely() -> None:
    drawn = np.zeros(4)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        samples = [replace(sample(i, 1), seed=int(rng.integers(1 << 60))) for i in range(4)]
        scores = [Score(float(i)) for i in range(3)] + [Score.invalid("timeout: test")]
        experience = group(samples, scores)
        advantages = BRPO(BRPO.Config(max_skew=1.0)).advantages(experience)
        (reference,) = np.flatnonzero([row[0] == 0 for row in advantages.tokens[:3]])
        drawn[reference] += 1
        assert samples[reference].seed == min(s.seed for s in samples[:3])
        assert advantages.keep.tolist() == [True, True, True, False]
    assert drawn[3] == 0 and drawn[:3].min() > 45


def test_brpo_refuses_what_comparisons_do_not_see() -> None:
    with pytest.raises(ValidationError, match="kl_in=reward has no effect on BRPO"):
        BRPO.Config(kl_coefficient=0.1, kl_in="reward")
    with pytest.raises(ValidationError, match="overlong_max_tokens has no effect on BRPO"):
        BRPO.Config(overlong_max_tokens=10)
    assert BRPO(BRPO.Config()).needs().min_samples_per_prompt == 2
    assert BRPO(BRPO.Config()).config.samples_per_prompt == 16


def test_the_losses_of_both_are_the_clipped_surrogate_of_grpo() -> None:
    from algorithms.grpo import GRPO

    options: dict[str, Any] = {"kl_coefficient": 0.0}
    expected = GRPO(GRPO.Config(**options)).loss(Rows().inputs()).loss.item()
    for algorithm in (StepCredit(StepCredit.Config(**options)), BRPO(BRPO.Config(**options))):
        inputs = Rows().inputs()
        output = algorithm.loss(inputs)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(expected, abs=1e-12)
        assert inputs.logprobs.grad is not None and inputs.logprobs.grad.any()


def test_outcomes_of_a_group_that_was_not_scored() -> None:
    prompt = Prompt("p", (Message("user", "?"),), (1, 2))
    with pytest.raises(ValueError, match="has no scores yet"):
        Outcomes.of(Experience([Group("g", prompt, (sample(0, 1),))], step=1))


def test_recipes(tmp_path: Path) -> None:
    pure = load_config(["algorithm=pure", "reward=implicit_prm", f"run_dir={tmp_path / 'run'}"])
    config = pure.make_algorithm().config
    assert (config.samples_per_prompt, config.temperature, config.outcome_coefficient) == (4, 0.1, 1.0)
    assert (config.kl_coefficient, config.kl_in, pure.config.learner.minibatches_per_step) == (0.001, "reward", 2)
    brpo = load_config(["algorithm=brpo", "reward=rule", f"run_dir={tmp_path / 'run'}"]).make_algorithm().config
    assert (brpo.samples_per_prompt, brpo.max_skew, brpo.kl_coefficient) == (16, 0.6, 0.0)
    with pytest.raises(ConfigError, match="StepCredit needs process rewards, but MathReward gives none"):
        load_config(["algorithm=pure", "reward=rule", f"run_dir={tmp_path / 'run'}"])
