"""Algorithm modules and recipes: that each does with scored groups what its functions say, options included."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import make_groups
from paths import ROOT
from test_grpo import Rows

from algorithms.base import Experience
from algorithms.functional.advantages import Outcomes, group_relative, leave_one_out
from algorithms.functional.returns import whiten
from algorithms.grpo import GRPO
from algorithms.reinforce_pp import ReinforcePP
from algorithms.rloo import RLOO
from algorithms.surrogate import SurrogateAlgorithm
from rlkit.config.loading import load_config
from rlkit.experience import GroupScores, Score

RECIPES = {
    "grpo": {"kl_coefficient": 0.04, "aggregation": "sequence_mean_token_mean", "kl_in": "loss", "kl_estimator": "k3"},
    "dr_grpo": {"normalize_by_std": False, "aggregation": "constant_length", "constant_length": 128},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean", "overlong_max_tokens": 128},
    "gspo": {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "aggregation": "token_mean"},
    "rloo": {"samples_per_prompt": 4, "aggregation": "sequence_mean_token_sum", "kl_coefficient": 0.0},
    "reinforce_pp": {"samples_per_prompt": 1, "kl_in": "reward", "kl_estimator": "k1"},
    "remax": {"samples_per_prompt": 1, "aggregation": "sequence_mean_token_sum", "kl_coefficient": 0.0},
    "reinforce_pp_baseline": {"baseline": "group", "kl_in": "loss", "kl_estimator": "k2"},
    "gmpo": {"loss": "gmpo", "clip_low": 0.32968, "clip_high": 0.49182, "kl_coefficient": 0.0},
    "dppo": {"loss": "dppo", "normalize_by_std": False, "aggregation": "constant_length", "constant_length": 128},
    "clip_cov": {"loss": "clip_cov", "clip_low": 1.0, "clip_high": 1.0, "aggregation": "token_mean"},
    "kl_cov": {"loss": "kl_cov", "aggregation": "token_mean", "kl_coefficient": 0.0},
}
SEVERAL_STEPS = ("gspo", "cispo", "dapo", "gmpo", "dppo", "clip_cov", "kl_cov")


def experience(count: int = 4, seed: int = 0, observations: bool = False) -> Experience:
    """Groups with log-probs of policy and reference; with `observations`, some tokens are not trained."""
    groups = make_groups(count, seed=seed)
    rng = np.random.default_rng(seed)
    if observations:
        for g, group in enumerate(groups):
            samples = tuple(replace(s, mask=rng.random(len(s)) < 0.7) for s in group.samples)
            groups[g] = replace(group, samples=samples)
    samples = [sample for group in groups for sample in group.samples]
    policy = [sample.logprobs for sample in samples]
    reference = [row + rng.normal(size=len(row)).astype(np.float32) for row in policy]
    return Experience(groups, step=1, policy_logprobs=policy, reference_logprobs=reference)


def rows_of(advantages: Any, outcomes: Any) -> list[np.ndarray]:
    return [row[mask] for row, mask in zip(advantages.tokens, outcomes.masks, strict=True)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_compute(name: str, tmp_path: Path) -> None:
    run = load_config([f"algorithm={name}", "reward=rule", f"run_dir={tmp_path / 'run'}"])
    algorithm = run.make_algorithm()
    for key, value in RECIPES[name].items():
        assert getattr(algorithm.config, key) == value, key
    assert algorithm.needs().reference_policy == (algorithm.config.kl_coefficient > 0)
    if name in SEVERAL_STEPS:  # with one optimizer step per batch their losses would act like GRPO's
        assert run.config.learner.minibatches_per_step > 1
    assert run.config.buffer.drop_equal_rewards == (name in ("dapo", "clip_cov", "kl_cov"))
    given = experience(observations=True)
    judged = [replace(g, greedy=g.samples[0], scores=replace(g.scores, greedy=Score(0.5))) for g in given.groups]
    given = replace(given, groups=judged)  # only ReMax looks at it
    advantages = algorithm.advantages(given)
    samples = [sample for group in given.groups for sample in group.samples]
    assert [len(row) for row in advantages.tokens] == [len(sample) for sample in samples]
    assert advantages.keep.any() and not advantages.keep[1]  # the second sample has no valid score
    assert all(np.isfinite(row).all() and row.dtype == np.float32 for row in advantages.tokens)
    assert all((row[~sample.trained] == 0).all() for row, sample in zip(advantages.tokens, samples, strict=True))
    assert all(np.isfinite(value) for value in advantages.metrics.values())
    inputs = Rows().inputs()
    extras = {name: torch.zeros_like(inputs.logprobs) for name in advantages.extras}
    output = algorithm.loss(replace(inputs, extras=extras))
    output.loss.backward()
    assert output.loss.isfinite()


def test_rloo_spreads_leave_one_out_advantages() -> None:
    given = experience(observations=True)
    outcomes = Outcomes.of(given)
    expected, keep = leave_one_out(outcomes.rewards, outcomes.valid, outcomes.group)
    advantages = RLOO(RLOO.Config()).advantages(given)
    assert (advantages.keep == keep).all() and expected.any()
    for row, value in zip(rows_of(advantages, outcomes), expected, strict=True):
        np.testing.assert_allclose(row, value, rtol=1e-6)


@pytest.mark.parametrize("algorithm", [GRPO(GRPO.Config(kl_in="reward")), RLOO(RLOO.Config(kl_coefficient=0.04))])
def test_kl_in_the_reward_of_samples(algorithm: SurrogateAlgorithm) -> None:
    given = experience(observations=True)
    outcomes = Outcomes.of(given)
    assert given.policy_logprobs is not None and given.reference_logprobs is not None
    pairs = zip(given.policy_logprobs, given.reference_logprobs, outcomes.masks, strict=True)
    d = [(p.astype(np.float64) - r)[m] for p, r, m in pairs]
    k3 = algorithm.config.kl_estimator == "k3"
    penalty = np.array([(np.exp(-x) - 1 + x).sum() if k3 else x.sum() for x in d])
    rewards = outcomes.rewards - 0.04 * penalty
    rest = outcomes.valid, outcomes.group
    expected, _ = group_relative(rewards, *rest, normalize_by_std=True) if k3 else leave_one_out(rewards, *rest)
    advantages = algorithm.advantages(given)
    for row, value in zip(rows_of(advantages, outcomes), expected, strict=True):
        np.testing.assert_allclose(row, value, rtol=1e-4, atol=1e-6)
    assert algorithm.needs().token_kl
    with pytest.raises(ValueError, match="needs log-probs of policy and reference"):
        algorithm.advantages(replace(given, reference_logprobs=None))


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_reinforce_pp(baseline: Any) -> None:
    given = experience(observations=True)
    outcomes = Outcomes.of(given)
    assert given.policy_logprobs is not None and given.reference_logprobs is not None
    rewards, keep = outcomes.rewards, outcomes.valid
    if baseline == "group":
        rewards, keep = group_relative(rewards, outcomes.valid, outcomes.group, normalize_by_std=False)
    returns = []
    for i, mask in enumerate(outcomes.masks):  # token by token, from the end
        row, to_go, last = np.zeros(len(mask)), 0.0, True
        for t in reversed(range(len(mask))):
            if mask[t]:
                kl = float(given.policy_logprobs[i][t]) - float(given.reference_logprobs[i][t])
                to_go = (rewards[i] if last else 0.0) - 0.01 * kl + 0.9 * to_go
                row[t], last = to_go, False
        returns.append(row)
    expected = whiten(returns, outcomes.masks, keep)
    advantages = ReinforcePP(ReinforcePP.Config(baseline=baseline, gamma=0.9)).advantages(given)
    assert (advantages.keep == keep).all()
    for row, wanted in zip(advantages.tokens, expected.tokens, strict=True):
        np.testing.assert_allclose(row, wanted, atol=1e-5)
    assert advantages.metrics["advantage/return_std"] == pytest.approx(expected.variance**0.5)
    assert ReinforcePP(ReinforcePP.Config(baseline=baseline)).needs().min_samples_per_prompt == 1 + (
        baseline == "group"
    )


def test_overlong_answers_are_worth_less() -> None:
    given = experience()
    scores = GroupScores(tuple(Score(1.0) for _ in given.groups[0].samples))
    given = replace(given, groups=[group.with_scores(scores) for group in given.groups])
    outcomes = Outcomes.of(given)
    advantages = RLOO(RLOO.Config(overlong_max_tokens=10, overlong_buffer_share=0.5)).advantages(given)
    shaped = 1 - np.clip((outcomes.lengths - 5) / 5, 0, 1)
    expected, _ = leave_one_out(shaped, outcomes.valid, outcomes.group)
    np.testing.assert_allclose([row[0] for row in advantages.tokens], expected, atol=1e-6)
    assert advantages.metrics["reward/overlong_penalty"] == pytest.approx((shaped - 1).mean())


def test_a_sample_without_a_trained_token_is_no_part_of_its_group() -> None:
    given = experience(count=1)
    group = given.groups[0]
    untrained = replace(group.samples[0], mask=np.zeros(len(group.samples[0]), dtype=np.bool_))
    group = replace(group, samples=(untrained, *group.samples[1:]))
    scores = GroupScores((Score(1000.0), *(Score(float(i)) for i in range(1, 4))))
    given = replace(given, groups=[group.with_scores(scores)])
    advantages = RLOO(RLOO.Config()).advantages(given)
    assert advantages.keep.tolist() == [False, True, True, True]
    assert [row[0] for row in advantages.tokens[1:]] == [-1.5, 0.0, 1.5]


def test_refusals_reach_the_command_line(tmp_path: Path) -> None:
    from rlkit.config.messages import ConfigError

    with pytest.raises(ConfigError, match="kl_in has no effect with kl_coefficient=0"):
        load_config(["algorithm=dr_grpo", "reward=rule", "algorithm.kl_in=reward", f"run_dir={tmp_path / 'run'}"])


def test_the_worked_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/algorithms.md").read_text()
    (code,) = re.findall(r"<!-- my_algorithms.py -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    (command,) = re.findall(r"^python -m rlkit\.train (algorithm\._target_=.*)$", page, flags=re.MULTILINE)
    (tmp_path / "my_algorithms.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_algorithms", raising=False)
    run = load_config([*command.split(), "reward=rule", f"run_dir={tmp_path / 'run'}"])
    algorithm = run.make_algorithm()
    assert algorithm.config.least_reward == 0.7  # type: ignore[attr-defined]
    given = experience()
    scores = GroupScores((Score(1.0), Score(0.0), Score(1.0), Score.invalid("timeout: x")))
    worst = GroupScores(tuple(Score(0.0) for _ in range(4)))
    groups = [given.groups[0].with_scores(scores), given.groups[1].with_scores(worst)]
    advantages = algorithm.advantages(Experience(groups, step=1))
    assert advantages.keep.tolist() == [True, False, True, False, *[False] * 4]
    assert [row.max() for row in advantages.tokens] == [1.0, 0.0, 1.0, 0.0, *[0.0] * 4]
    assert algorithm.loss(Rows().inputs()).loss.isfinite()


def test_the_surrogates_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/algorithms.md").read_text()
    (code,) = re.findall(r"<!-- my_losses.py -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    for loss in ("my_losses.reinforce", "my_losses.SoftClip"):
        inputs = Rows().inputs()
        output = RLOO(RLOO.Config(loss=loss)).loss(inputs)
        output.loss.backward()
        assert output.loss.isfinite() and inputs.logprobs.grad is not None and inputs.logprobs.grad.any()
