"""Links: worked numbers of papers, and limits. (test_preference.py compares them with TRL.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.functional import links
from algorithms.functional.pairs import (
    adjacent,
    all_unequal,
    best_worst,
    consistency,
    dynamic_beta,
    kendall_tau,
)

# -- worked numbers -----------------------------------------------------------------


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_cream_trusts_a_pair_as_far_as_two_scorers_agree() -> None:
    first, second = np.array([3.0, 1.0, 2.0, 0.0]), np.array([2.0, 3.0, 1.0, 0.0])
    assert kendall_tau(first, second) == pytest.approx(1 / 3)
    c = consistency(first, second)
    assert c == pytest.approx(2 / 3)
    assert links.sigmoid(one(0.4), one(0.0), 1.0, one(c)).item() == pytest.approx(0.646349, abs=1e-6)
    assert kendall_tau(first, first) == 1.0
    assert kendall_tau(first, -first) == -1.0
    with pytest.raises(ValueError, match="two scores"):
        kendall_tau(first[:1], first[:1])


def test_dno_regresses_to_the_preference_s_probability() -> None:
    probability = one(1 / (1 + math.exp(-(0.8 - 0.3))))
    chosen, rejected = one(0.4), one(-0.2)
    assert links.sigmoid(chosen, rejected, 0.5, probability).item() == pytest.approx(0.667617, abs=1e-6)
    assert links.sigmoid(chosen, rejected, 0.5).item() == pytest.approx(0.554355, abs=1e-6)
    best = torch.logit(probability) / 0.5
    best.requires_grad_()
    links.sigmoid(best, one(0.0), 0.5, probability).backward()
    assert best.grad is not None and best.grad.item() == pytest.approx(0, abs=1e-12)


def test_rdp_and_its_clipped_form() -> None:
    chosen, rejected, gain = one(0.3), one(-0.1), one(0.8)
    assert links.rdp(chosen, rejected, 1.0, gain).item() == pytest.approx(0.16)
    clipped = links.rdp(chosen, rejected, 1.0, gain, one(0.1), one(-0.05), 0.1)
    assert clipped.item() == pytest.approx(0.25)
    assert links.rdp(chosen, rejected, 1.0, gain, one(0.1), one(-0.05), 5.0).item() == pytest.approx(0.16)


def test_copg_and_rdp_are_one_loss() -> None:
    chosen, rejected, gain = one(0.3).requires_grad_(), one(-0.1), one(0.8)
    loss = links.copg(chosen, rejected, 0.5, gain)
    assert loss.item() == pytest.approx(-0.28)
    (slope,) = torch.autograd.grad(loss, chosen)
    assert slope.item() == pytest.approx(-0.6)
    squared = links.rdp(chosen, rejected, 0.5, gain)
    assert 0.25 * squared.item() == pytest.approx(0.36)  # (R_b - R_b')^2 = beta^2 rdp
    (other,) = torch.autograd.grad(0.25 * squared, chosen)
    assert slope.item() == pytest.approx(other.item())


@pytest.mark.parametrize("link", [links.copg, links.rdp])
def test_off_policy_pairs_lead_a_bandit_to_the_optimal_policy(link: Callable[..., Tensor]) -> None:
    """Uniform pairs of three arms: pi becomes proportional to pi_ref exp(R / beta)."""
    rewards, reference = torch.tensor([1.0, 0.2, -0.5]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor(list(combinations(range(3), 2))).T
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - reference.log()
        total = link(ratio[first], ratio[second], 0.5, rewards[first] - rewards[second]).sum()
        total.backward()
        return total

    optimizer.step(loss)
    policy = logits.detach().softmax(0)
    torch.testing.assert_close(
        policy, torch.tensor([0.633143, 0.319573, 0.047284]).double(), atol=2e-6, rtol=0, check_dtype=False
    )


def test_tgdpo_weighs_tokens_by_a_guide() -> None:
    ratios, guide = torch.tensor([0.5, -0.2, -0.3, 0.1]).double(), torch.tensor([1.0, -0.5, -0.8, 0.4]).double()
    mask, sequence = torch.ones(4), torch.tensor([0, 0, 1, 1])

    def loss(alpha: float) -> tuple[float, float]:
        as_chosen, as_rejected = (
            links.sample_sums(ratios * weight, mask, sequence, 2) for weight in links.tgdpo_weights(guide, 0.1, alpha)
        )
        z = 0.1 * (as_chosen[:1] - as_rejected[1:])
        return z.item(), links.sigmoid(as_chosen[:1], as_rejected[1:], 0.1).item()

    assert loss(0.5) == (pytest.approx(0.0544, abs=1e-6), pytest.approx(0.666317, abs=1e-6))
    assert loss(0.0) == (pytest.approx(0.05, abs=1e-6), pytest.approx(0.668460, abs=1e-6))


PSI = (0.533333, -0.266667, 0.133333, -0.4)


def test_pacs_classifies_scores_less_the_others_mean() -> None:
    scores, correct = torch.tensor([0.4, -0.2, 0.1, -0.3]).double(), torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    group = torch.zeros(4, dtype=torch.int64)
    np.testing.assert_allclose(links.less_others(scores, group), PSI, atol=1e-6)
    losses = links.pacs(scores, correct, group, 1.0)
    np.testing.assert_allclose(losses, [0.461622, 0.568677, 0.762034, 0.513015], atol=1e-6)
    assert losses.mean().item() == pytest.approx(0.576337, abs=1e-6)
    weighted = links.pacs(scores, correct, group, 1.0, links.class_weights(correct, group))
    assert weighted.mean().item() == pytest.approx(0.538099, abs=1e-6)


def test_pacs_looks_at_each_group_alone_and_learns_through_the_mean() -> None:
    scores = torch.tensor([0.4, 1.0, -0.2, 0.1, 2.0, -0.3], dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 1, 0, 0, 2, 0])
    psi = links.less_others(scores, group)
    np.testing.assert_allclose(psi.detach()[[0, 2, 3, 5]], PSI, atol=1e-6)
    assert psi[1].item() == psi[4].item() == 0.0
    (slope,) = torch.autograd.grad(psi[0], scores)
    np.testing.assert_allclose(slope, [1, 0, -1 / 3, -1 / 3, 0, -1 / 3], atol=1e-12)
    assert links.class_weights(torch.tensor([1.0, 1.0]), torch.tensor([0, 0])).tolist() == [1.0, 1.0]


def test_treg_adds_the_models_own_token_rewards() -> None:
    better, worse = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([-2.0, -1.5, -0.5]).double()
    h = links.treg_rewards(better, worse)
    np.testing.assert_allclose(h, [0.231059, -0.122459, 0.0], atol=1e-6)
    logprobs = torch.tensor([-0.7, -1.2, -0.4]).double()
    term = -(0.1 * h * logprobs).sum()
    assert term.item() == pytest.approx(0.001479, abs=1e-6)
    chosen, rejected = one(0.3).requires_grad_(), one(-0.1)
    assert links.sigmoid(chosen, rejected).item() == pytest.approx(0.513015, abs=1e-6)
    regulariser = links.treg(chosen, rejected, 1.0, term[None], one(0.02))
    assert regulariser.item() == pytest.approx(0.401312 * (term.item() + 0.02), abs=1e-7)
    total = links.sigmoid(chosen, rejected) + 0.25 * regulariser
    assert total.item() == pytest.approx(0.515170, abs=1e-6)
    assert not regulariser.requires_grad  # its weight has no gradient


def test_mm_dpo_s_beta_grows_with_the_gain() -> None:
    gains = np.array([-3.0, 0.0, 1.0, 2.0, np.inf])
    np.testing.assert_allclose(dynamic_beta(gains, 0.1), [0.1, 0.1, 0.119673, 0.131606, 0.15], atol=1e-6)


def test_margins_and_soft_labels_of_secrets_of_rlhf() -> None:
    assert links.sigmoid(one(0.9), one(0.0), margin=0.7).item() == pytest.approx(0.598139, abs=1e-6)
    assert links.sigmoid(one(0.9), one(0.0)).item() == pytest.approx(0.341154, abs=1e-6)
    assert links.sigmoid(one(0.9), one(0.0), probability=one(0.9)).item() == pytest.approx(0.431154, abs=1e-6)


def test_wpo_weights_have_no_gradient() -> None:
    chosen, rejected = torch.tensor([-0.5, -2.0], requires_grad=True), torch.tensor([-0.1, -1.0])
    weights = links.wpo_weights(chosen, rejected)
    np.testing.assert_allclose(weights, np.exp([-0.6, -3.0]), atol=1e-6)
    assert not weights.requires_grad


def test_bco_s_baseline_shifts_the_score() -> None:
    losses = links.bco(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), 0.4, 0.5)
    np.testing.assert_allclose(losses, [math.log1p(math.exp(-0.3)), math.log1p(math.exp(0.3))], atol=1e-6)


# -- limits and helpers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "options", "first"),
    [
        (links.sigmoid, (0.1,), math.log(2)),
        (links.robust, (0.1, 0.2), math.log(2)),
        (links.ipo, (0.1,), 25.0),
        (links.hinge, (0.1,), 1.0),
        (links.exo, (0.1, 0.1), -math.log(2) - (math.log(0.9) + math.log(0.1)) / 2),
        (links.nca, (0.1,), 2 * math.log(2)),
        (links.apo_zero, (0.1,), 1.0),
        (links.apo_down, (0.1,), 1.0),
        (links.sppo, (0.1,), 50.0),
    ],
)
def test_the_first_loss_of_a_policy_that_is_its_reference(
    link: Callable[..., Tensor], options: tuple[float, ...], first: float
) -> None:
    assert link(one(0.0), one(0.0), *options).item() == pytest.approx(first)


@pytest.mark.parametrize("link", [links.sigmoid, links.nca, links.exo, links.apo_zero, links.orpo, links.robust])
def test_extreme_scores_stay_finite(link: Callable[..., Tensor]) -> None:
    options = (0.05,) if link in (links.exo, links.robust) else ()
    for extreme in (-2000.0, -1e-4):
        chosen = torch.tensor([extreme], requires_grad=True)
        loss = link(chosen, torch.tensor([-1.0]), 1.0, *options)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert chosen.grad is not None and torch.isfinite(chosen.grad).all()


def test_orpo_keeps_its_digits_where_a_response_is_all_but_certain() -> None:
    """In fp32 exp(-1e-8) is 1."""
    for chosen, rejected in ((-1e-6, -1.0), (-1e-8, -1.0), (0.0, -1.0), (-1.0, 0.0)):
        rows = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        loss = links.orpo(rows[0], rows[1], 0.1)
        loss.sum().backward()
        held = [min(x, -1e-7) for x in (chosen, rejected)]
        log_odds = [x - math.log(-math.expm1(x)) for x in held]
        exact = 0.1 * math.log1p(math.exp(log_odds[1] - log_odds[0]))
        assert loss.item() == pytest.approx(exact, rel=1e-4)
        assert all(row.grad is not None and torch.isfinite(row.grad).all() for row in rows)


def test_sums_of_first_tokens_count_trained_tokens() -> None:
    rows = torch.arange(1.0, 8.0).requires_grad_()
    mask, sequence = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    sums = links.first_sums(rows, mask, sequence, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 1, 2, 3]))
    assert sums.tolist() == [0.0, 4.0, 4.0, 10.0, 17.0]
    (slope,) = torch.autograd.grad(sums[3], rows)
    assert slope.tolist() == [0, 0, 0, 1, 0, 1, 0]


def test_which_responses_are_compared() -> None:
    scores = np.array([0.5, 2.0, 2.0, -1.0])
    assert best_worst(scores) == [(1, 3)]
    assert best_worst(np.zeros(3)) == []
    assert all_unequal(scores) == [(0, 3), (1, 0), (1, 3), (2, 0), (2, 3)]
    assert adjacent(scores) == [(2, 0), (0, 3)]
