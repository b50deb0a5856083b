"""An entropy bonus that is on below a target, and a reward of their own for responses without an end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_advantages_modules import experience
from test_grpo import Rows

from algorithms.base import Experience
from algorithms.brpo import BRPO
from algorithms.distill import Distill
from algorithms.functional.entropy import AdaptiveEntropy
from algorithms.gdpo import GDPO
from algorithms.grpo import GRPO
from algorithms.ppo import PPO
from algorithms.rloo import RLOO
from algorithms.surrogate import SurrogateAlgorithm, SurrogateConfig
from rlkit.config.loading import load_config

PUBLISHED = {"kl_coefficient": 0.0, "entropy_target": 0.2}
"""Skywork-OR1's: step 1e-4, at most 0.005."""


def test_the_weight_climbs_below_the_target_and_falls_above() -> None:
    bonus = AdaptiveEntropy(0.0, target=0.2, step=1e-4, limit=0.005)
    assert bonus.weight == 0
    seen = []
    for entropy in (0.15, 0.1, 0.25, 0.2, 0.19, float("nan"), 0.3, 0.3, 0.3):
        bonus = bonus.adjust(entropy)
        seen.append((round(bonus.value, 6), round(bonus.weight, 6)))
    # Above the target, and at it, the bonus is off, but its weight is remembered.
    assert seen == [
        (1e-4, 1e-4), (2e-4, 2e-4), (1e-4, 0), (0, 0), (1e-4, 1e-4), (1e-4, 1e-4), (0, 0), (0, 0), (0, 0)
    ]  # fmt: skip
    for _ in range(60):
        bonus = bonus.adjust(0.1)
    assert bonus.value == bonus.weight == 0.005


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_the_bonus_follows_the_measured_entropy_and_acts_in_the_loss(kl: float) -> None:
    algorithm = GRPO(GRPO.Config(**{**PUBLISHED, "kl_coefficient": kl, "entropy_step": 0.004}))
    given, rows = experience(), Rows()
    weights = []
    for entropy in (None, 0.1, 0.1, 0.5):
        if entropy is not None:
            algorithm.observe({"policy/entropy": entropy, "policy/trained_samples": 4.0})
        advantages = algorithm.advantages(given)
        assert advantages.metrics["policy/entropy_coefficient"] == advantages.scalars["entropy_coefficient"]
        weights.append(advantages.scalars["entropy_coefficient"])
        inputs = replace(rows.inputs(), scalars=advantages.scalars)
        fixed = GRPO(GRPO.Config(kl_coefficient=kl, entropy_coefficient=weights[-1])).loss(rows.inputs()).loss
        assert torch.equal(algorithm.loss(inputs).loss, fixed)
    assert weights == [0, 0.004, 0.005, 0]
    state = json.loads(json.dumps(algorithm.state_dict()))
    other = GRPO(algorithm.config)
    other.load_state_dict(state)
    assert other.state_dict() == algorithm.state_dict() and other.advantages(given).scalars == advantages.scalars


def test_a_sample_without_advantage_is_computed_where_there_may_be_a_bonus() -> None:
    assert GRPO(GRPO.Config(kl_coefficient=0)).needs().skips_zero_advantages
    assert not GRPO(GRPO.Config(**PUBLISHED)).needs().skips_zero_advantages


def test_defaults_change_nothing() -> None:
    algorithm = GRPO(GRPO.Config(kl_coefficient=0))
    advantages = algorithm.advantages(experience())
    assert advantages.scalars == {} and algorithm.state_dict() == {}
    assert "policy/entropy_coefficient" not in advantages.metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_step": 1e-3}, "entropy_step has no effect without entropy_target"),
        ({"entropy_limit": 1.0}, "entropy_limit has no effect without entropy_target"),
        ({"entropy_target": 0.2, "entropy_coefficient": 0.01}, "starts above entropy_limit=0.005"),
    ],
)
def test_options_of_the_bonus_act_or_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SurrogateConfig(**options)


def truncated(given: Experience, which: set[int]) -> Experience:
    groups, i = [], 0
    for group in given.groups:
        samples = []
        for sample in group.samples:
            samples.append(replace(sample, finish_reason="length" if i in which else "stop"))
            i += 1
        groups.append(replace(group, samples=tuple(samples)))
    return replace(given, groups=groups)


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_a_response_without_an_end_gets_its_own_reward(kind: type[SurrogateAlgorithm]) -> None:
    given = truncated(experience(), {0, 5})
    plain = kind(kind.Config(kl_coefficient=0.0)).advantages(given)
    same = kind(kind.Config(kl_coefficient=0.0, truncated_reward=-10.0)).advantages(truncated(given, set()))
    assert all((a == b).all() for a, b in zip(plain.tokens, same.tokens, strict=True))
    # As if the reward had said so.
    groups, i = [], 0
    for group in given.groups:
        assert group.scores is not None
        scores = []
        for score in group.scores.samples:
            scores.append(replace(score, value=-10.0) if i in (0, 5) and score.valid else score)
            i += 1
        groups.append(group.with_scores(replace(group.scores, samples=tuple(scores))))
    expected = kind(kind.Config(kl_coefficient=0.0)).advantages(replace(given, groups=groups))
    advantages = kind(kind.Config(kl_coefficient=0.0, truncated_reward=-10.0)).advantages(given)
    assert all((a == b).all() for a, b in zip(advantages.tokens, expected.tokens, strict=True))
    assert not all((a == b).all() for a, b in zip(advantages.tokens, plain.tokens, strict=True))
    assert (advantages.keep == expected.keep).all()


def test_ppo_sees_the_penalty_on_the_last_token() -> None:
    """Tulu 3: -10. With lambda = gamma = 1 and values of 0 a token's advantage is the reward."""
    given = truncated(experience(), {0})
    rows = [sample.logprobs for group in given.groups for sample in group.samples]
    given = replace(given, values=[np.zeros(len(row), np.float32) for row in rows])
    config = PPO.Config(truncated_reward=-10.0, whiten_advantages=False)
    advantages = PPO(config).advantages(given)
    assert (advantages.tokens[0][given.groups[0].samples[0].trained] == -10).all()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (BRPO.Config, {}, "truncated_reward has no effect on BRPO"),
        (GDPO.Config, {"components": {"correct": 1}}, "truncated_reward has no effect on GDPO"),
        (Distill.Config, {"teacher": "embedded:policy"}, "truncated_reward has no effect: distillation"),
        (GRPO.Config, {"estimator": "maxrl"}, "truncated_reward cannot be negative"),
    ],
)
def test_where_the_penalty_would_not_act_it_is_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**options, truncated_reward=-1.0)


def test_both_are_reachable_by_a_command(tmp_path: Path) -> None:
    words = ["algorithm.entropy_target=0.2", "algorithm.truncated_reward=-10", f"run_dir={tmp_path / 'run'}"]
    run = load_config(["algorithm=grpo", "reward=rule", *words])
    assert (run.algorithm_config.entropy_target, run.algorithm_config.truncated_reward) == (0.2, -10)
