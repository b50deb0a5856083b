"""GRPO: advantages against published numbers, losses and gradients against float64 formulas written from the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_fixture import make_groups

from algorithms.base import Denominators, Experience, LossInputs
from algorithms.functional.advantages import group_relative
from algorithms.functional.losses import Aggregation, aggregate, clipped_surrogate, kl_divergence
from algorithms.grpo import GRPO
from rlkit.experience import GroupScores, Score

REWARDS = np.array([-0.5703, -11.0304, -6.7070, -2.0059])
Z_SCORES = np.array([0.94799313, -1.25162599, -0.34247280, 0.64610566])  # ddof 1, epsilon 1e-6
AGGREGATIONS: tuple[Aggregation, ...] = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "constant_length",
)
CONSTANT = 7


# -- advantages -----------------------------------------------------------------------------------------


def relative(rewards: Any, valid: Any = None, group: Any = None, std: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rewards = np.asarray(rewards, dtype=np.float64)
    valid = np.ones(len(rewards), dtype=np.bool_) if valid is None else np.asarray(valid)
    group = np.zeros(len(rewards), dtype=np.int64) if group is None else np.asarray(group)
    return group_relative(rewards, valid, group, normalize_by_std=std)


def test_z_scores_of_a_group_are_the_published_ones() -> None:
    advantages, keep = relative(REWARDS)
    np.testing.assert_allclose(advantages, Z_SCORES, atol=5e-9)
    assert keep.all()


def test_without_std_only_the_mean_is_taken_off() -> None:
    advantages, _ = relative(REWARDS, std=False)
    np.testing.assert_allclose(advantages, REWARDS - REWARDS.mean(), atol=1e-12)


@given(st.permutations(range(8)))
def test_groups_are_told_apart_by_id_wherever_their_rows_stand(order: list[int]) -> None:
    rewards = np.concatenate([REWARDS, REWARDS * 3 + 100])
    group = np.array([7] * 4 + [2] * 4)
    advantages, keep = relative(rewards[order], group=group[order])
    # the second group's std is three times larger, so epsilon weighs a third
    np.testing.assert_allclose(advantages, np.concatenate([Z_SCORES, Z_SCORES])[order], atol=1e-6)
    assert keep.all()


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=5))
def test_invalid_samples_change_nobodys_advantage(noise: list[float]) -> None:
    rewards = np.concatenate([noise, REWARDS])
    valid = np.array([False] * len(noise) + [True] * 4)
    advantages, keep = relative(rewards, valid)
    np.testing.assert_allclose(advantages[valid], Z_SCORES, atol=5e-9)
    assert (advantages[~valid] == 0).all()
    assert (keep == valid).all()


def test_a_reward_that_is_not_finite_is_ignored_where_it_is_invalid() -> None:
    advantages, keep = relative([*REWARDS, math.nan], [True] * 4 + [False])
    np.testing.assert_allclose(advantages, [*Z_SCORES, 0], atol=5e-9)
    assert keep.tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("std", [True, False])
def test_one_valid_sample_has_nobody_to_be_compared_with(std: bool) -> None:
    advantages, keep = relative([5.0, 9.0, 1.0], [False, True, False], std=std)
    assert not advantages.any()
    assert not keep.any()


@pytest.mark.parametrize("reward", [0.1, 0.0, -11.0304, 1e12])
@pytest.mark.parametrize("std", [True, False])
def test_an_all_equal_group_gets_exactly_zero_and_is_kept(reward: float, std: bool) -> None:
    advantages, keep = relative([reward] * 3, std=std)
    assert advantages.tolist() == [0.0] * 3
    assert keep.all()


def test_grpo_spreads_each_samples_advantage_over_its_tokens() -> None:
    groups = make_groups(count=3)
    broken = groups[1].samples[0:4]
    groups[1] = replace(groups[1], scores=GroupScores((Score(1.0), *[Score.invalid("timeout: x")] * (len(broken) - 1))))
    result = GRPO(GRPO.Config()).advantages(Experience(groups, step=1))
    samples = [sample for group in groups for sample in group.samples]
    assert [len(tokens) for tokens in result.tokens] == [len(sample) for sample in samples]
    assert all(tokens.dtype == np.float32 and np.ptp(tokens) == 0 for tokens in result.tokens)
    assert result.keep.tolist() == [True, False, True, True, *[False] * 4, *[True] * 4]
    for g in (0, 2):
        rewards = np.array([score.value for _, score in groups[g].scored() if score.valid])
        got = [tokens[0] for tokens, kept in zip(result.tokens, result.keep, strict=True) if kept][3 * (g == 2) :][
            : len(rewards)
        ]
        np.testing.assert_allclose(got, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6), rtol=1e-6)


# -- losses: float64, one token at a time, from the papers ---------------------------------------------


def surrogate_by_hand(logprob: float, old: float, advantage: float, low: float, high: float) -> float:
    """PPO eq. 7: -min(r A, clip(r, 1 - low, 1 + high) A)."""
    ratio = math.exp(logprob - old)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def k3_by_hand(logprob: float, reference: float) -> float:
    """GRPO eq. 4: ref / pi - log(ref / pi) - 1."""
    return math.exp(reference - logprob) - (reference - logprob) - 1


def aggregate_by_hand(
    rows: np.ndarray, mask: np.ndarray, sequence: np.ndarray, tokens: float, sequences: float, how: str
) -> float:
    total = 0.0
    for s in np.unique(sequence):
        own = rows[(sequence == s) & (mask > 0)]
        if not len(own):
            continue
        if how == "token_mean":
            total += own.sum() / tokens
        elif how == "sequence_mean_token_mean":
            total += own.mean() / sequences
        elif how == "sequence_mean_token_sum":
            total += own.sum() / sequences
        else:
            total += own.sum() / (sequences * CONSTANT)
    return total


class Rows:
    """Random rows of a few samples, as arrays; away from the kinks so that finite differences exist."""

    def __init__(self, seed: int = 0, samples: int = 5) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 7, samples)
        self.samples, n = samples, int(lengths.sum())
        self.sequence = np.repeat(np.arange(samples), lengths)
        self.old = rng.uniform(-4, -0.5, n)
        # ratios inside, below and above the clip range
        self.logprobs = self.old + rng.choice([-0.6, -0.3, -0.05, 0.02, 0.1, 0.35, 0.7], n)
        self.reference = self.old + rng.uniform(-1, 1, n)
        self.advantages = np.repeat(rng.choice([-1.3, -0.2, 0.0, 0.8, 2.0], samples), lengths)
        self.entropy = rng.uniform(0, 3, n)
        self.mask = (rng.random(n) < 0.8).astype(np.float64)
        self.mask[0] = 1.0
        self.denominators = Denominators(
            tokens=float(self.mask.sum()),
            sequences=float(len(np.unique(self.sequence[self.mask > 0]))),
            groups=1.0,
        )

    def inputs(self, dtype: torch.dtype = torch.float64, rows: slice | np.ndarray = slice(None)) -> LossInputs:
        """Of some rows (whole samples); sequences are renumbered from 0."""

        def tensor(values: np.ndarray, grad: bool = False) -> torch.Tensor:
            return torch.tensor(values[rows], dtype=dtype, requires_grad=grad)

        names, sequence = np.unique(self.sequence[rows], return_inverse=True)
        return LossInputs(
            logprobs=tensor(self.logprobs, True),
            entropy=tensor(self.entropy, True),
            old_logprobs=tensor(self.old),
            rollout_logprobs=tensor(self.old),
            advantages=tensor(self.advantages),
            mask=tensor(self.mask),
            sequence=torch.from_numpy(sequence),
            group=torch.zeros(len(names), dtype=torch.int64),
            denominators=self.denominators,
            reference_logprobs=tensor(self.reference),
        )

    def grpo_by_hand(self, config: GRPO.Config, logprobs: np.ndarray, entropy: np.ndarray) -> float:
        rows = np.array(
            [
                surrogate_by_hand(p, o, a, config.clip_low, config.clip_high)
                + config.kl_coefficient * k3_by_hand(p, r)
                - config.entropy_coefficient * h
                for p, o, a, r, h in zip(logprobs, self.old, self.advantages, self.reference, entropy, strict=True)
            ]
        )
        counts = self.denominators
        return aggregate_by_hand(rows, self.mask, self.sequence, counts.tokens, counts.sequences, config.aggregation)


def finite_differences(function: Any, at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(at)
    for i in range(len(at)):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_clipped_surrogate(low: float, high: float) -> None:
    rows = Rows(samples=12)
    logprobs = torch.tensor(rows.logprobs, requires_grad=True)
    loss, clipped = clipped_surrogate(
        logprobs, torch.tensor(rows.old), torch.tensor(rows.advantages), clip_low=low, clip_high=high
    )
    by_hand = [
        surrogate_by_hand(p, o, a, low, high) for p, o, a in zip(rows.logprobs, rows.old, rows.advantages, strict=True)
    ]
    np.testing.assert_allclose(loss.detach(), by_hand, atol=1e-12)
    loss.sum().backward()
    ratio = np.exp(rows.logprobs - rows.old)
    binds = ((rows.advantages > 0) & (ratio > 1 + high)) | ((rows.advantages < 0) & (ratio < 1 - low))
    assert binds.any() and not binds.all()
    assert (clipped.numpy() == binds).all()
    np.testing.assert_allclose(logprobs.grad, np.where(binds, 0, -rows.advantages * ratio), atol=1e-12)


def test_k3_divergence() -> None:
    rows = Rows(samples=12)
    logprobs = torch.tensor(rows.logprobs, requires_grad=True)
    divergence = kl_divergence(logprobs, torch.tensor(rows.reference), "k3")
    by_hand = [k3_by_hand(p, r) for p, r in zip(rows.logprobs, rows.reference, strict=True)]
    np.testing.assert_allclose(divergence.detach(), by_hand, atol=1e-12)
    assert (divergence >= 0).all()
    divergence.sum().backward()
    np.testing.assert_allclose(logprobs.grad, 1 - np.exp(rows.reference - rows.logprobs), atol=1e-12)
    far = kl_divergence(torch.tensor([-400.0, -1.0]), torch.tensor([-1.0, -400.0]), "k3")
    assert torch.isfinite(far).all()


def test_k3_is_unbiased_for_samples_of_the_policy() -> None:
    rng = np.random.default_rng(3)
    policy, reference = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    estimate = kl_divergence(torch.tensor(policy), torch.tensor(reference), "k3").numpy()
    exact = float((np.exp(policy) * (policy - reference)).sum())
    assert float((np.exp(policy) * estimate).sum()) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_aggregations(how: Aggregation, seed: int) -> None:
    rows = Rows(seed, samples=8)
    values = torch.tensor(rows.logprobs, requires_grad=True)
    counts = rows.denominators

    def ours(of: torch.Tensor) -> torch.Tensor:
        sequence = torch.from_numpy(rows.sequence)
        return aggregate(of, torch.tensor(rows.mask), sequence, rows.samples, counts, how, CONSTANT)

    def by_hand(of: np.ndarray) -> float:
        return aggregate_by_hand(of, rows.mask, rows.sequence, counts.tokens, counts.sequences, how)

    assert ours(values).item() == pytest.approx(by_hand(rows.logprobs), abs=1e-12)
    ours(values).backward()
    np.testing.assert_allclose(values.grad, finite_differences(by_hand, rows.logprobs), atol=1e-8)
    assert (values.grad.numpy()[rows.mask == 0] == 0).all()


def test_constant_length_needs_its_constant() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="needs a constant_length"):
        aggregate(one, one, torch.zeros(1, dtype=torch.int64), 1, Denominators(1, 1, 1), "constant_length")


CONFIGS = [
    GRPO.Config(),
    GRPO.Config(aggregation="token_mean", clip_high=0.28, kl_coefficient=0.0),
    GRPO.Config(aggregation="sequence_mean_token_sum", entropy_coefficient=0.01),
    GRPO.Config(aggregation="token_mean", kl_coefficient=0.5, entropy_coefficient=0.02),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grpo_loss_and_gradients(config: GRPO.Config, dtype: torch.dtype) -> None:
    for seed in range(3):
        rows = Rows(seed)
        inputs = rows.inputs(dtype)
        output = GRPO(config).loss(inputs)
        output.loss.backward()
        by_hand = rows.grpo_by_hand(config, rows.logprobs, rows.entropy)
        assert output.loss.item() == pytest.approx(by_hand, abs=1e-5)
        gradient = finite_differences(lambda p, r=rows: r.grpo_by_hand(config, p, r.entropy), rows.logprobs)
        np.testing.assert_allclose(inputs.logprobs.grad, gradient, atol=1e-5)
        of_entropy = finite_differences(lambda h, r=rows: r.grpo_by_hand(config, r.logprobs, h), rows.entropy)
        got = np.zeros_like(of_entropy) if inputs.entropy.grad is None else inputs.entropy.grad.numpy()
        np.testing.assert_allclose(got, of_entropy, atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 50), st.sampled_from(CONFIGS), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_shares_of_any_split_into_microbatches_add_up(seed: int, config: GRPO.Config, parts: list[int]) -> None:
    """`parts[i]` is the micro-batch of sample i: samples of one group may be in several."""
    rows, algorithm = Rows(seed, samples=6), GRPO(config)
    whole_inputs = rows.inputs()
    whole = algorithm.loss(whole_inputs)
    whole.loss.backward()
    loss, sums = 0.0, dict.fromkeys(whole.sums, 0.0)
    gradient = np.zeros_like(rows.logprobs)
    for part in set(parts):
        members = np.flatnonzero(np.array(parts)[rows.sequence] == part)
        inputs = rows.inputs(rows=members)
        output = algorithm.loss(inputs)
        output.loss.backward()
        loss += output.loss.item()
        gradient[members] = inputs.logprobs.grad
        for name, value in output.sums.items():
            sums[name] += value.item()
    assert loss == pytest.approx(whole.loss.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, whole_inputs.logprobs.grad, atol=1e-12)
    for name, value in whole.sums.items():
        assert sums[name] == pytest.approx(value.item(), abs=1e-12)


def test_grpo_says_what_it_needs() -> None:
    assert GRPO(GRPO.Config()).needs().reference_policy
    assert not GRPO(GRPO.Config(kl_coefficient=0.0)).needs().reference_policy
    assert GRPO(GRPO.Config()).needs().min_samples_per_prompt == 2
