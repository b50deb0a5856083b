"""ReMax's greedy baseline from the sampler to the advantage, and a KL coefficient that follows the KL it measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_advantages_modules import experience
from test_grpo import Rows

from algorithms.base import Experience
from algorithms.functional.advantages import Outcomes
from algorithms.functional.kl import AdaptiveCoefficient
from algorithms.grpo import GRPO
from algorithms.remax import ReMax
from algorithms.rloo import RLOO
from algorithms.surrogate import SurrogateAlgorithm
from rewards.base import RewardContext
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group, GroupScores, PreferencePair, Score
from rlkit.experience.scores import with_greedy, without_greedy
from rlkit.serving.worker import RewardWorker


def with_greedy_scores(given: Experience, greedy: list[Score]) -> Experience:
    """Each group's first sample stands for its greedy response."""
    groups = [
        replace(
            group,
            greedy=group.samples[0],
            scores=replace(group.scores or GroupScores(()), greedy=score),
        )
        for group, score in zip(given.groups, greedy, strict=True)
    ]
    return replace(given, groups=groups)


def test_remax_compares_with_the_greedy_response() -> None:
    given = with_greedy_scores(
        experience(observations=True), [Score(1.0), Score(0.0), Score.invalid("timeout: x"), Score(-2.0)]
    )
    outcomes = Outcomes.of(given)
    advantages = ReMax(ReMax.Config()).advantages(given)
    baseline = np.repeat([1.0, 0.0, np.nan, -2.0], 4)
    assert (advantages.keep == (outcomes.valid & np.isfinite(baseline))).all()
    assert advantages.keep[0] and not advantages.keep[1] and not advantages.keep[8:12].any()
    for i, kept in enumerate(advantages.keep):
        wanted = outcomes.rewards[i] - baseline[i] if kept else 0.0
        np.testing.assert_allclose(advantages.tokens[i][outcomes.masks[i]], wanted, rtol=1e-6)
    assert advantages.metrics["reward/greedy_mean"] == pytest.approx(-1 / 3)


def test_remax_without_greedy_responses_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="no scored greedy response"):
        ReMax(ReMax.Config()).advantages(experience())


def test_the_greedy_response_is_scored_with_the_others_and_kept_apart(tmp_path: Path) -> None:
    worker = RewardWorker("rewards.verifiers.math.MathReward", {}, RewardContext())
    group = scorable_group()
    (result,), report = worker.score(None, [group])
    worker.close()
    assert report.samples == 3  # a greedy response that cannot be judged counts as a failure, too
    assert [score.value for score in result.samples] == [1.0, 0.0]
    assert result.greedy is not None and result.greedy.value == 1.0


def scorable_group() -> Group:
    from reward_samples import make_group, make_sample

    return replace(make_group("a", ["#### 42", "#### 43"]), greedy=make_sample(0, "so #### 42"))


def test_preferences_about_the_greedy_response_are_left_out() -> None:
    group = scorable_group()
    whole = with_greedy(group)
    assert [sample.index for sample in whole.samples] == [0, 1, 2]
    scores = GroupScores((Score(1.0), Score(2.0), Score(3.0)), (PreferencePair(1, 0), PreferencePair(2, 0)))
    back = without_greedy(scores, group)
    assert back.pairs == (PreferencePair(1, 0),)
    assert with_greedy(group.with_scores(back)).scores == GroupScores(scores.samples, (PreferencePair(1, 0),))
    plain = replace(group, greedy=None)
    assert with_greedy(plain) is plain


def test_adaptive_coefficient_against_the_paper() -> None:
    # arXiv 1909.08593 section 2.2 by hand: 0.1 (1 + 0.2 * 256 / 10000) twice too high, then half as high as wanted
    kl = AdaptiveCoefficient(0.1, target=6.0)
    assert kl.adjust(12.0, 256).value == pytest.approx(0.1 * 1.00512)
    assert kl.adjust(3.0, 256).value == pytest.approx(0.1 * (1 - 0.00512))
    assert kl.adjust(6.6, 256).value == pytest.approx(0.1 * (1 + 0.1 * 0.0256))
    assert kl.adjust(float("nan"), 256) is kl


@pytest.mark.parametrize(
    "algorithm",
    [
        GRPO(GRPO.Config(kl_coefficient=0.1, kl_target=0.01, kl_horizon=100)),
        RLOO(RLOO.Config(kl_coefficient=0.1, kl_target=0.01, kl_horizon=100)),
    ],
)
def test_the_coefficient_follows_what_was_measured_and_acts(algorithm: SurrogateAlgorithm) -> None:
    given = experience()
    first = algorithm.advantages(given)
    assert first.scalars == {"kl_coefficient": 0.1}
    assert first.metrics["kl/coefficient"] == 0.1
    algorithm.observe({"kl/reference": 5.0, "policy/trained_samples": 50.0})
    second = algorithm.advantages(given)
    assert second.scalars["kl_coefficient"] == pytest.approx(0.1 * 1.1)
    rows = Rows()
    losses = [algorithm.loss(replace(rows.inputs(), scalars=advantages.scalars)).loss for advantages in (first, second)]
    in_loss = algorithm.config.kl_in == "loss"
    assert (not torch.equal(losses[0], losses[1])) == in_loss
    moved = any((a != b).any() for a, b in zip(first.tokens, second.tokens, strict=True))
    assert moved == (not in_loss)
    other = type(algorithm)(algorithm.config)
    other.load_state_dict(algorithm.state_dict())
    assert other.kl_coefficient == algorithm.kl_coefficient


def test_kl_in_the_reward_is_measured_where_it_is_paid() -> None:
    given = experience()
    advantages = RLOO(RLOO.Config(kl_coefficient=0.1)).advantages(given)
    assert given.policy_logprobs is not None and given.reference_logprobs is not None
    valid = Outcomes.of(given).valid
    rows = [p - r for p, r, v in zip(given.policy_logprobs, given.reference_logprobs, valid, strict=True) if v]
    assert advantages.metrics["kl/reference"] == pytest.approx(
        float(np.concatenate(rows).mean(dtype=np.float64)), abs=1e-6
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.kl_target=0.1", "kl_target has no effect with kl_coefficient=0"),
        ("algorithm.kl_horizon=5", "kl_horizon has no effect without kl_target"),
    ],
)
def test_options_of_the_adaptive_coefficient_act_or_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(["algorithm=rloo", "reward=rule", override, f"run_dir={tmp_path / 'run'}"])
