"""PRIME: every published or recomputed number about implicit rewards, losses, returns and advantages.

Two prompts A and B with four responses each, beta 0.05. Garbage stands on the tokens that are not trained.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prime_tables import (
    BETA,
    CORRECT,
    DISCOUNTED_OFFICIAL,
    GROUP,
    GRPO,
    MEAN_BASELINE_RAW,
    OFFICIAL_ADVANTAGE,
    OFFICIAL_PROCESS,
    RANK_LOCAL,
    REFERENCE,
    REINFORCE,
    STRICT_ADVANTAGE,
    STRICT_PROCESS,
    SUMS,
    VALID,
    VERL_ADVANTAGE,
    VERL_RETURN,
    VERL_SCORES,
    WIDTH,
    Batch,
    Q,
    added,
)

from algorithms.base import Denominators
from algorithms.functional import links, prime
from algorithms.functional.links import cross_entropy, kto, sample_sums
from algorithms.functional.losses import aggregate, clipped_surrogate
from algorithms.functional.prime import prime_rloo
from algorithms.functional.returns import gae, reward_to_go
from algorithms.functional.selection import pair_accuracy, sign_accuracy

# -- implicit rewards and the losses that train the model ----------------------------------------------


def tensors(garbage: float = 7.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs under model (with gradient) and reference, and the mask, flat with garbage between the samples."""
    batch = Batch(garbage=garbage)
    reference = np.array([[*row, *[garbage] * (WIDTH - len(row))] for row in REFERENCE]).ravel()
    model = torch.tensor(reference + np.concatenate(batch.q), requires_grad=True)
    return model, torch.tensor(reference), torch.tensor(np.concatenate(batch.masks).astype(np.float64))


SEQUENCE = torch.repeat_interleave(torch.arange(8), WIDTH)


def test_cross_entropy_values_and_gradients() -> None:
    model, reference, mask = tensors()
    scores = BETA * sample_sums(model - reference, mask, SEQUENCE, 8)
    np.testing.assert_allclose(scores.detach(), BETA * SUMS, atol=1e-9)
    np.testing.assert_allclose(
        torch.sigmoid(scores).detach(),
        [0.509999, 0.492501, 0.509999, 0.492501, 0.517493, 0.492501, 0.505000, 0.487503],
        atol=1e-6,
    )
    losses = cross_entropy(scores, torch.tensor(CORRECT))
    expected = [0.673347, 0.678260, 0.673347, 0.678260, 0.658760, 0.678260, 0.703197, 0.668460]
    np.testing.assert_allclose(losses.detach(), expected, atol=1e-6)
    assert losses.mean().item() == pytest.approx(0.676486, abs=1e-6)
    losses.mean().backward()
    assert model.grad is not None
    gradient = model.grad.numpy().reshape(8, WIDTH)
    per_token = [-0.003063, 0.003078, -0.003063, 0.003078, -0.003016, 0.003078, 0.003156, 0.003047]
    for row, value, mask_row in zip(gradient, per_token, mask.numpy().reshape(8, WIDTH), strict=True):
        np.testing.assert_allclose(row[mask_row > 0], value, atol=1e-6)
        assert (row[mask_row == 0] == 0).all()


def test_losses_of_single_examples() -> None:
    chosen, rejected = torch.tensor([0.04]), torch.tensor([-0.03])
    assert links.sigmoid(chosen, rejected).item() == pytest.approx(0.658760, abs=1e-6)
    assert links.nca(chosen, rejected).item() == pytest.approx(1.369151, abs=1e-6)


def test_kto() -> None:
    losses = kto(torch.tensor(BETA * SUMS), torch.tensor(CORRECT), torch.tensor(BETA * 0.075))
    assert losses[0].item() == pytest.approx(0.490938, abs=1e-6)
    assert losses[1].item() == pytest.approx(0.491563, abs=1e-6)
    assert losses.mean().item() == pytest.approx(0.491330, abs=1e-6)


def test_a_saturated_score_keeps_its_gradient() -> None:
    score = torch.tensor([200.0], requires_grad=True)
    loss = cross_entropy(score, torch.tensor([0.0]))
    loss.sum().backward()
    assert loss.item() == 200.0
    assert score.grad is not None
    assert score.grad.item() == 1.0


def test_prefix_values_are_soft_values_of_the_reference() -> None:
    """Proposition 3.1: the running sum of rewards equals beta log E_ref exp(R / beta), and bounds of 3.2 hold."""
    first_ref, first = np.array([0.5, 0.5]), np.array([0.7, 0.3])
    then_ref, then = np.array([[0.6, 0.4], [0.3, 0.7]]), np.array([[0.8, 0.2], [0.5, 0.5]])
    value = BETA * np.log(first / first_ref)
    rewards = value[:, None] + BETA * np.log(then / then_ref)
    soft = BETA * np.log((then_ref * np.exp(rewards / BETA)).sum(1))
    np.testing.assert_allclose(value, [0.016824, -0.025541], atol=1e-6)
    np.testing.assert_allclose(soft, value, atol=1e-12)
    assert (then_ref[0] * rewards[0]).sum() == pytest.approx(0.011591, abs=1e-6)
    assert rewards[0].max() == pytest.approx(0.031208, abs=1e-6)


def test_pair_and_sign_accuracy() -> None:
    assert pair_accuracy(SUMS, CORRECT, GROUP, VALID).tolist() == [1.0, 1.0]
    assert sign_accuracy(SUMS, CORRECT, VALID) == 7 / 8
    truncated = [row.sum() for row in prime.without_last_token(Batch().q, Batch().masks)]
    assert sign_accuracy(np.array(truncated), CORRECT, VALID) == 6 / 8  # what verl reports


# -- returns and advantages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "process", "mean", "variance", "advantage"),
    [
        ("official", OFFICIAL_PROCESS, 0.076984, 1.884461, OFFICIAL_ADVANTAGE),
        ("strict", STRICT_PROCESS, 0.080556, 1.863677, STRICT_ADVANTAGE),
    ],
)
def test_leave_one_out(baseline: Any, process: Any, mean: float, variance: float, advantage: Any) -> None:
    batch = Batch()
    scaled, divisor = prime.normalise(batch.q, batch.masks, batch.valid, "global_max_return")
    assert divisor == pytest.approx(1.400001, abs=1e-9)
    terms = prime.rloo(scaled, *batch.groups, baseline=baseline)
    batch.check(terms.process, process)
    outcome = [2 / 3, -2 / 3, 2 / 3, -2 / 3, 1, -1 / 3, -1 / 3, -1 / 3]
    batch.check(terms.outcome, [[o] * len(q) for o, q in zip(outcome, Q, strict=True)])
    result = prime.combine(terms, batch.masks, process_coefficient=1.0, outcome_coefficient=1.0)
    batch.check(result.returns, [[p + o for p in row] for row, o in zip(process, outcome, strict=True)])
    assert result.metrics["prime/return_mean"] == pytest.approx(mean, abs=1e-6)
    assert result.metrics["prime/return_std"] ** 2 == pytest.approx(variance, abs=2e-6)
    batch.check(result.advantages, advantage)


@pytest.mark.parametrize(
    ("mode", "expected"), [("official", OFFICIAL_ADVANTAGE), ("strict", STRICT_ADVANTAGE), ("verl", VERL_ADVANTAGE)]
)
def test_parity_modes(mode: Any, expected: Any) -> None:
    batch = Batch()
    result = prime_rloo(batch.q, *batch.groups, mode=mode)
    tolerance = 2e-5 if mode == "strict" else 2e-6  # beta q: the 1e-6 in the divisor weighs twenty times more
    batch.check(result.advantages, expected, tolerance)
    if mode == "verl":
        batch.check(result.returns, VERL_RETURN, 5e-6)
        assert result.metrics["prime/return_mean"] == pytest.approx(0.022232, abs=1e-6)
        assert result.metrics["prime/return_std"] ** 2 == pytest.approx(25.683547, abs=1e-4)


def test_verl_scores() -> None:
    batch = Batch()
    cut = prime.without_last_token(batch.scores, batch.masks)
    scaled, divisor = prime.normalise(cut, batch.masks, batch.valid, "global_max_return")
    assert divisor == pytest.approx(0.050001, abs=1e-9)
    batch.check(scaled, VERL_SCORES)


def test_unnormalised_mean_baseline() -> None:
    batch = Batch()
    scaled, divisor = prime.normalise(batch.scores, batch.masks, batch.valid, "none")
    assert divisor == 1.0
    batch.check(prime.rloo(scaled, *batch.groups, baseline="strict").process, MEAN_BASELINE_RAW)


def test_process_discount() -> None:
    batch = Batch()
    scaled, _ = prime.normalise(batch.q, batch.masks, batch.valid, "global_max_return")
    terms = prime.rloo(scaled, *batch.groups, baseline="official", process_gamma=0.9)
    batch.check(terms.process, DISCOUNTED_OFFICIAL)
    batch.check(terms.outcome, [[o] * len(q) for o, q in zip([2 / 3, -2 / 3] * 2 + [1] + [-1 / 3] * 3, Q, strict=True)])


def test_outcome_discount_counts_tokens_to_the_end() -> None:
    batch = Batch()
    terms = prime.rloo(batch.scores, *batch.groups, outcome_gamma=0.5)
    np.testing.assert_allclose(terms.outcome[0][:3], [2 / 12, 2 / 6, 2 / 3], atol=1e-12)


def test_rank_local_normalisation_is_another_number() -> None:
    """What the official code does on two ranks; ours always divides by one number, so it takes two calls."""
    whole, rows = Batch(), []
    for ids in (range(4), range(4, 8)):
        rank = Batch(ids)
        scaled, _ = prime.normalise(rank.q, rank.masks, rank.valid, "global_max_return")
        rows += prime.rloo(scaled, *rank.groups, baseline="official").process
    whole.check(rows, RANK_LOCAL)


def test_reinforce() -> None:
    batch = Batch()
    batch.check(added(prime.reinforce(batch.scores, *batch.groups)), REINFORCE)


def test_grpo() -> None:
    batch = Batch()
    batch.check(added(prime.grpo(batch.scores, *batch.groups, ddof=0, epsilon=0.0)), GRPO, 5e-6)
    sample_std = prime.grpo(batch.scores, *batch.groups, ddof=1, epsilon=0.0)
    np.testing.assert_allclose(added(sample_std)[0][:3], [3.583473, 2.355589, 2.577011], atol=5e-6)
    np.testing.assert_allclose(added(sample_std)[6][:1], [0.011463], atol=5e-6)
    for ids, outcome, spread in (
        (range(4), [1.0, -1, 1, -1], 0.017926),
        (range(4, 8), [1.732051, *[-0.57735] * 3], 0.020107),
    ):
        group = Batch(ids)
        assert prime.token_means(group.scores, group.masks).std() == pytest.approx(spread, abs=1e-6)
        terms = prime.grpo(group.scores, *group.groups, ddof=0, epsilon=0.0)
        np.testing.assert_allclose([row[0] for row in terms.outcome], outcome, atol=1e-6)


def test_ppo_rewards_give_reinforce_returns_without_a_critic() -> None:
    batch = Batch()
    rewards = prime.token_rewards(batch.scores, batch.outcome, batch.masks, batch.valid)
    nothing = [np.zeros(WIDTH) for _ in rewards]
    batch.check(gae(rewards, nothing, batch.masks, gamma=1.0, lam=1.0).advantages, REINFORCE)


def test_coefficients_act() -> None:
    batch = Batch()

    def advantages(process: float, outcome: float) -> np.ndarray:
        result = prime_rloo(batch.q, *batch.groups, process_coefficient=process, outcome_coefficient=outcome)
        return np.concatenate(result.advantages)

    even = advantages(1, 1)
    np.testing.assert_allclose(advantages(5, 5), even, atol=1e-7)  # only their ratio matters once whitened
    assert np.abs(advantages(0.2, 1) - even).max() > 0.1
    outcome_only = advantages(0, 1)
    assert len(set(np.round(outcome_only[:3], 9))) == 1
    share = prime_rloo(batch.q, *batch.groups, process_coefficient=0.0).metrics["prime/process_variance_share"]
    assert share == 0.0


def test_parity_modes_refuse_what_they_would_ignore() -> None:
    batch = Batch()
    with pytest.raises(ValueError, match="own coefficients"):
        prime_rloo(batch.q, *batch.groups, mode="official", outcome_coefficient=5.0)
    with pytest.raises(ValueError, match="no discount"):
        prime_rloo(batch.q, *batch.groups, mode="verl", process_gamma=0.9)


def test_the_scale_of_the_process_rewards_does_not_matter_when_normalised() -> None:
    batch = Batch()
    for how in ("global_max_return", "global_std"):
        one = prime_rloo(batch.q, *batch.groups, normaliser=how, beta=1.0)
        other = prime_rloo(batch.q, *batch.groups, normaliser=how, beta=50.0)
        np.testing.assert_allclose(np.concatenate(other.advantages), np.concatenate(one.advantages), atol=1e-5)
    clean = Batch(garbage=0.0)
    flat = np.concatenate([r[m] for r, m in zip(reward_to_go(clean.q, clean.masks), clean.masks, strict=True)])
    assert prime.normalise(batch.q, batch.masks, batch.valid, "global_std").divisor == flat.std(ddof=1) + 1e-6


@settings(deadline=None, max_examples=40)
@given(
    st.permutations(range(8)), st.sampled_from([math.nan, 1e30, -3.0]), st.sampled_from(["strict", "official", "verl"])
)
def test_order_of_rows_and_garbage_change_nothing(order: list[int], garbage: float, mode: Any) -> None:
    batch, plain = Batch(order, garbage), Batch()
    expected = prime_rloo(plain.q, *plain.groups, mode=mode).advantages
    got = prime_rloo(batch.q, *batch.groups, mode=mode).advantages
    for i, row in zip(order, got, strict=True):
        np.testing.assert_allclose(row, expected[i], atol=1e-9)


@pytest.mark.parametrize("estimator", [prime.rloo, prime.grpo, prime.reinforce])
def test_invalid_samples_change_nobody(estimator: Any) -> None:
    batch = Batch()
    expected = estimator(batch.scores, *batch.groups)
    extra = Batch([*range(8), 0, 4])
    extra.outcome = np.array([*CORRECT, math.nan, 99.0])
    extra.valid = np.array([True] * 8 + [False] * 2)
    got = estimator(extra.scores, *extra.groups)
    for a, b in zip(added(expected), added(got)[:8], strict=True):
        np.testing.assert_array_equal(a, b)
    assert got.keep.tolist() == [True] * 8 + [False] * 2
    assert not any(row.any() for row in added(got)[8:])


@pytest.mark.parametrize("estimator", [prime.rloo, prime.grpo])
def test_a_lone_sample_and_an_all_equal_group(estimator: Any) -> None:
    masks = [np.ones(2, dtype=np.bool_)] * 3
    process = [np.array([0.3, 0.1])] * 3
    terms = estimator(process, np.array([1.0, 1.0, 1.0]), masks, np.array([0, 1, 1]), np.ones(3, dtype=np.bool_))
    assert terms.keep.tolist() == [False, True, True]
    assert not terms.process[0].any() and not terms.outcome[0].any()
    np.testing.assert_allclose([o.sum() for o in terms.outcome], 0.0, atol=0)
    assert np.isfinite(np.concatenate(terms.process)).all()


def test_clipped_surrogate_oracle() -> None:
    ratio = torch.tensor([1.1, 0.5, 1.6], dtype=torch.float64)
    loss, clipped = clipped_surrogate(ratio.log(), torch.zeros(3), torch.tensor([1.0, -1.0, 2.0]), 0.2, 0.2)
    np.testing.assert_allclose(loss, [-1.1, 0.8, -2.4], atol=1e-12)
    ones, counts = torch.ones(3), Denominators(3, 1, 1)
    mean = aggregate(loss, ones, torch.zeros(3, dtype=torch.int64), 1, counts, "token_mean")
    assert mean.item() == pytest.approx(-0.9)
    assert clipped.double().mean().item() == pytest.approx(2 / 3)
