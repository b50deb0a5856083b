"""AMFT: both losses as means over their own tokens, in the weights of the controller."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from learner_fixture import build_learner, make_groups, write_tiny_model

from algorithms.amft import AMFT, controlled
from algorithms.base import Advantages, Experience
from algorithms.functional.losses import clipped_surrogate
from algorithms.grpo import GRPO
from rlkit.config.schema import LearnerConfig
from rlkit.experience import Group, GroupScores, Score
from rlkit.experience.types import Recorded
from rlkit.learner.dealing import policy_shares
from rlkit.learner.joint import JointLearner


def test_the_controllers_worked_number() -> None:
    mixed = controlled(0.5, 0.2, 0.6, 1.0, meta_rate=0.1, entropy_rate=0.05, bounds=(0.05, 0.95))
    assert mixed == pytest.approx(0.54)
    assert controlled(0.9, 9.0, 0.6, 1.0, meta_rate=0.1, entropy_rate=0.05, bounds=(0.05, 0.95)) == 0.95
    assert controlled(0.1, -9.0, 0.6, 1.0, meta_rate=0.1, entropy_rate=0.05, bounds=(0.05, 0.95)) == 0.05


def with_demonstrations(groups: list[Group]) -> list[Group]:
    shown = []
    for group in make_groups(len(groups), 2, seed=7):
        samples = tuple(replace(sample, logprobs=None) for sample in group.samples)
        shown.append(replace(group, samples=samples, scores=GroupScores((Score(1.0),) * 2)))
    return [*groups, *shown]


@pytest.mark.parametrize("limit", [40, 16384])
def test_the_loss_is_the_weighted_sum_of_both_means(tmp_path: Path, limit: int) -> None:
    model = write_tiny_model(tmp_path / "model")
    groups = with_demonstrations(make_groups(3))
    algorithm = AMFT(AMFT.Config(mu=0.3))
    learner = build_learner(model, algorithm=algorithm, tokens_per_microbatch=limit)
    rows = [torch.from_numpy(row) for row in learner.group_logprobs(groups)]
    advantages = algorithm.advantages(Experience(groups, 1))
    fresh, shown = groups[:3], groups[3:]
    plain: Advantages = GRPO(GRPO.Config(kl_coefficient=0.0)).advantages(Experience(fresh, 1))
    count = sum(len(group.samples) for group in fresh)
    surrogates = [
        clipped_surrogate(row, row, torch.from_numpy(credit), 0.2, 0.2)[0]
        for row, credit, kept in zip(rows[:count], plain.tokens, plain.keep, strict=True)
        if kept
    ]
    likelihood = -torch.cat(rows[count:]).mean()
    wanted = 0.7 * torch.cat(surrogates).mean() + 0.3 * likelihood
    assert advantages.keep[count:].all() and len(advantages.tokens) == sum(len(g.samples) for g in (*fresh, *shown))
    assert learner.update(groups, advantages)["policy/loss"] == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)


def test_the_controller_waits_for_its_target_then_follows_entropy_and_reward() -> None:
    algorithm = AMFT(AMFT.Config(warmup_steps=2, meta_window=1, meta_rate=0.1, entropy_rate=0.5))
    for entropy in (1.0, 0.8):
        algorithm.observe({"policy/entropy": entropy, "reward/mean": 0.2})
    assert (algorithm.mu, algorithm.target) == (0.5, pytest.approx(0.9))
    algorithm.observe({"policy/entropy": 0.7, "reward/mean": 0.2})  # no slope: mu has not moved yet
    assert algorithm.mu == pytest.approx(0.6)
    algorithm.observe({"policy/entropy": 0.9, "reward/mean": 0.25})  # slope 0.05 / 0.1
    assert algorithm.mu == pytest.approx(0.65)
    again = AMFT(algorithm.config)
    again.load_state_dict(algorithm.state_dict())
    for one in (algorithm, again):
        one.observe({"policy/entropy": 0.6, "reward/mean": 0.1})
    assert again.mu == algorithm.mu
    falling = AMFT(AMFT.Config(warmup_steps=1, meta_rate=0.0, entropy_sign=-1))
    falling.observe({"policy/entropy": 1.0, "reward/mean": 0.0})
    falling.observe({"policy/entropy": 0.5, "reward/mean": 0.0})
    assert falling.mu < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 0.99}, "within mu_bounds"),
        ({"mu_bounds": (0.6, 0.4)}, "within mu_bounds"),
        ({"aggregation": "constant_length", "constant_length": 5}, "token_mean"),
        ({"kl_coefficient": 0.1}, "kl_in=reward"),
    ],
)
def test_options_that_do_not_mix(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AMFT.Config(**options)


def test_every_mini_batch_has_samples_and_demonstrations() -> None:
    class Policy:
        section = SimpleNamespace(epochs_per_step=1)

    groups = [
        replace(group, prompt=replace(group.prompt, recorded=Recorded(shown.samples, shown.scores)))
        for group, shown in zip(make_groups(4), with_demonstrations(make_groups(4))[4:], strict=True)
    ]
    learner = object.__new__(JointLearner)
    learner.algorithm, learner.policy, learner.critic, learner.references = AMFT(AMFT.Config()), Policy(), None, None
    experience = asyncio.run(learner.experience(groups, 1))
    advantages = learner.algorithm.advantages(experience)
    (share,), _ = policy_shares(
        experience.groups, advantages, LearnerConfig(minibatches_per_step=2), learner.algorithm.needs()
    )
    for minibatch in share.minibatches:
        marks = [rows.extras["demonstration"] for _, rows in minibatch.microbatches if rows is not None]
        assert 0 < np.concatenate(marks).mean() < 1


def test_a_loss_that_selects_tokens_selects_samples_only() -> None:
    groups = with_demonstrations(make_groups(2))
    advantages = AMFT(AMFT.Config(loss="kl_cov", loss_options={"share": 1.0})).advantages(Experience(groups, 1))
    for selected, shown in zip(advantages.extras["selected"], advantages.extras["demonstration"], strict=True):
        assert len(selected) == len(shown) and not (selected * shown).any()
    assert any(row.any() for row in advantages.extras["selected"])


def test_samples_alone_are_grpos() -> None:
    groups = make_groups(2)
    credit = AMFT(AMFT.Config(mu=0.05, mu_bounds=(0.0, 1.0))).advantages(Experience(groups, 1))
    plain = GRPO(GRPO.Config(kl_coefficient=0.0)).advantages(Experience(groups, 1))
    for one, other in zip(credit.tokens, plain.tokens, strict=True):
        np.testing.assert_allclose(one, 0.95 * other, rtol=1e-6)
