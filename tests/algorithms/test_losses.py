"""Policy, value and reward-model losses: values and gradients against float64 formulas written from the papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_grpo import CONSTANT, Rows, aggregate_by_hand, finite_differences

from algorithms.functional import kl, links
from algorithms.functional.links import correct_incorrect_pairs, cross_entropy, kto, kto_baseline, sample_sums
from algorithms.functional.losses import (
    cispo_surrogate,
    clipped_surrogate,
    clipped_value_loss,
    gspo_surrogate,
    kl_divergence,
    rollout_weights,
    sequence_log_ratio,
)
from algorithms.functional.returns import explained_variance
from algorithms.grpo import GRPO
from algorithms.reinforce_pp import ReinforcePP
from algorithms.rloo import RLOO
from algorithms.surrogate import SurrogateConfig

# -- the whole policy loss, by hand ----------------------------------------------------------------------


class StaleRows(Rows):
    """Rows whose sampler was another policy than the one before the update."""

    def __init__(self, seed: int = 0, samples: int = 5) -> None:
        super().__init__(seed, samples)
        rng = np.random.default_rng(seed + 1000)
        self.rollout = self.old + rng.choice([-1.5, -0.3, 0.0, 0.2, 0.9], len(self.old))
        self.rollout[self.mask == 0] = math.nan  # nobody sampled them

    def inputs(self, dtype: torch.dtype = torch.float64, rows: Any = slice(None)) -> Any:
        from dataclasses import replace

        return replace(super().inputs(dtype, rows), rollout_logprobs=torch.tensor(self.rollout[rows], dtype=dtype))

    def ratios(self, config: SurrogateConfig, logprobs: np.ndarray) -> np.ndarray:
        """pi / pi_old of each token, or of each sample (geometric mean over its trained tokens)."""
        log_ratio = logprobs - self.anchor(config)
        if config.loss == "gspo":
            for s in np.unique(self.sequence):
                mine, trained = self.sequence == s, (self.sequence == s) & (self.mask > 0)
                log_ratio[mine] = log_ratio[trained].mean() if trained.any() else 0.0
        return np.exp(log_ratio)

    def anchor(self, config: SurrogateConfig) -> np.ndarray:
        return np.where(self.mask > 0, self.rollout, self.old) if config.anchor == "rollout" else self.old

    def weights(self, config: SurrogateConfig) -> np.ndarray:
        """pi_old / pi_rollout as the correction wants it."""
        log_ratio = np.where(self.mask > 0, self.old - self.rollout, 0.0)
        level, _, rule = (config.rollout_correction or "none").rpartition("_")
        for s in np.unique(self.sequence) if level else ():
            mine, trained = self.sequence == s, max(1, self.mask[self.sequence == s].sum())
            log_ratio[mine] = log_ratio[mine].sum() / (trained if level == "geometric" else 1)
        weight = np.exp(log_ratio)
        if rule == "none":
            return np.ones_like(weight)
        if rule == "truncate":
            return np.minimum(weight, config.largest_weight)
        if rule == "mask":
            kept = (weight <= config.largest_weight) & (weight >= (config.smallest_weight or 0))
            return np.where(kept, 1 if level == "geometric" else weight, 0)
        return weight

    def loss_by_hand(self, config: SurrogateConfig, logprobs: np.ndarray, entropy: np.ndarray) -> float:
        a, low, high = self.advantages, 1 - config.clip_low, 1 + config.clip_high
        if config.loss == "cispo":
            rows = -np.clip(np.exp(self.logprobs - self.anchor(config)), low, high) * a * logprobs
        else:
            ratio = self.ratios(config, logprobs)
            rows = -np.minimum(ratio * a, np.clip(ratio, low, high) * a)
            if config.dual_clip is not None:
                rows = np.where(a < 0, np.minimum(rows, -config.dual_clip * a), rows)
        rows = rows * self.weights(config)
        if config.kl_coefficient and config.kl_in == "loss":
            d = logprobs - self.reference
            divergence = d**2 / 2 if config.kl_estimator == "k2" else np.exp(-d) - 1 + d
            rows = rows + config.kl_coefficient * divergence * self.weights(config)
        rows = rows - config.entropy_coefficient * entropy
        counts = self.denominators
        how = config.aggregation
        return aggregate_by_hand(rows, self.mask, self.sequence, counts.tokens, counts.sequences, how)


NO_KL: dict[str, Any] = {"kl_coefficient": 0.0}
CONFIGS = [
    GRPO.Config(dual_clip=1.5, clip_high=0.28, **NO_KL),
    GRPO.Config(loss="gspo", clip_low=0.05, clip_high=0.06, **NO_KL),
    GRPO.Config(loss="cispo", clip_low=1.0, aggregation="token_mean", **NO_KL),
    GRPO.Config(aggregation="constant_length", constant_length=CONSTANT, kl_coefficient=0.1, kl_estimator="k2"),
    GRPO.Config(rollout_correction="truncate", largest_weight=2.0, entropy_coefficient=0.01),
    GRPO.Config(rollout_correction="mask", largest_weight=2.0, smallest_weight=0.5, aggregation="token_mean", **NO_KL),
    GRPO.Config(rollout_correction="decoupled", dual_clip=3.0, **NO_KL),
    GRPO.Config(rollout_correction="sequence_truncate", largest_weight=1.5),
    GRPO.Config(rollout_correction="sequence_mask", largest_weight=2.0, smallest_weight=0.3, **NO_KL),
    GRPO.Config(rollout_correction="geometric_mask", largest_weight=1.2, smallest_weight=0.7, **NO_KL),
    GRPO.Config(loss="cispo", rollout_correction="truncate", largest_weight=1.2),
    GRPO.Config(anchor="rollout"),
    GRPO.Config(anchor="rollout", loss="gspo", **NO_KL),
    GRPO.Config(anchor="rollout", loss="cispo", dual_clip=None, entropy_coefficient=0.01),
    RLOO.Config(),
    RLOO.Config(kl_coefficient=0.05),
    ReinforcePP.Config(),
    ReinforcePP.Config(baseline="group", kl_in="loss", kl_estimator="k2", gamma=0.9),
]
CLASSES = {GRPO.Config: GRPO, RLOO.Config: RLOO, ReinforcePP.Config: ReinforcePP}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients(config: SurrogateConfig, dtype: torch.dtype) -> None:
    for seed in range(3):
        rows = StaleRows(seed)
        inputs = rows.inputs(dtype)
        output = CLASSES[type(config)](config).loss(inputs)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(rows.loss_by_hand(config, rows.logprobs, rows.entropy), abs=1e-5)
        gradient = finite_differences(lambda p, r=rows: r.loss_by_hand(config, p, r.entropy), rows.logprobs)
        np.testing.assert_allclose(inputs.logprobs.grad, gradient, atol=1e-5)
        of_entropy = finite_differences(lambda h, r=rows: r.loss_by_hand(config, r.logprobs, h), rows.entropy)
        got = np.zeros_like(of_entropy) if inputs.entropy.grad is None else inputs.entropy.grad.numpy()
        np.testing.assert_allclose(got, of_entropy, atol=1e-5)
        assert all(torch.isfinite(value) for value in output.sums.values())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 50),
    st.sampled_from(CONFIGS),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.permutations(range(6)),
)
def test_micro_batches_in_any_order_add_up(
    seed: int, config: SurrogateConfig, parts: list[int], order: list[int]
) -> None:
    """`parts[i]` is the micro-batch of sample i; samples stand in any order in them."""
    rows, algorithm = StaleRows(seed, samples=6), CLASSES[type(config)](config)
    whole_inputs = rows.inputs()
    whole = algorithm.loss(whole_inputs)
    whole.loss.backward()
    loss, sums = 0.0, dict.fromkeys(whole.sums, 0.0)
    gradient = np.zeros_like(rows.logprobs)
    for part in set(parts):
        chosen = [s for s in order if parts[s] == part]
        members = np.concatenate([np.flatnonzero(rows.sequence == s) for s in chosen])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "gspo", "dual_clip": 3.0}, "dual_clip has no effect with loss=gspo"),
        ({"constant_length": 5}, "go together"),
        ({"aggregation": "constant_length"}, "go together"),
        ({"kl_coefficient": 0.0, "kl_in": "reward"}, "kl_in has no effect with kl_coefficient=0"),
        ({"kl_coefficient": 0.0, "kl_estimator": "k2"}, "kl_estimator has no effect"),
        ({"kl_estimator": "k1"}, "no gradient in expectation"),
        ({"rollout_correction": "truncate"}, "largest_weight goes with"),
        ({"largest_weight": 2.0}, "largest_weight goes with"),
        ({"rollout_correction": "decoupled", "largest_weight": 2.0}, "largest_weight goes with"),
        ({"rollout_correction": "truncate", "largest_weight": 2.0, "smallest_weight": 0.5}, "smallest_weight has no"),
        ({"rollout_correction": "mask", "largest_weight": 0.2, "smallest_weight": 0.5}, "no token would be left"),
        ({"rollout_correction": "sequence_mask"}, "largest_weight goes with"),
        (
            {"rollout_correction": "sequence_truncate", "largest_weight": 2.0, "smallest_weight": 0.5},
            "smallest_weight has no",
        ),
        ({"loss": "dppo", "rollout_correction": "truncate", "largest_weight": 2.0}, "would correct twice"),
        ({"anchor": "rollout", "rollout_correction": "decoupled"}, "twice: the ratio of anchor=rollout"),
        ({"anchor": "rollout", "loss": "dppo", "kl_coefficient": 0.0}, "anchor=rollout has no effect with loss=dppo"),
        ({"anchor": "rollout", "loss": "policy_gradient"}, "anchor=rollout has no effect"),
        ({"overlong_buffer_share": 0.5}, "no effect without overlong_max_tokens"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPO.Config(**options)


# -- parts -----------------------------------------------------------------------------------------------


def test_dual_clip_bounds_only_tokens_with_negative_advantage() -> None:
    ratio = torch.tensor([10.0, 10.0, 2.0], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    loss, binds = clipped_surrogate(logprobs, torch.zeros(3), torch.tensor([-1.0, 1.0, -1.0]), 0.2, 0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.2, 2.0])
    assert binds.tolist() == [True, True, False]
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_an_exploded_ratio_leaves_values_and_gradients_finite() -> None:
    logprobs = torch.tensor([-0.1, -900.0], requires_grad=True)
    for advantages in (torch.ones(2), -torch.ones(2)):
        loss, _ = clipped_surrogate(logprobs, torch.tensor([-900.0, -0.1]), advantages, 0.2, 0.2)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logprobs.grad).all()  # type: ignore[arg-type]


def test_gspo_clips_samples_as_one() -> None:
    old, mask = torch.zeros(5, dtype=torch.float64), torch.tensor([1.0, 1, 1, 0, 1], dtype=torch.float64)
    logprobs = torch.tensor([0.3, -0.3, 0.0, 50.0, 0.5], dtype=torch.float64, requires_grad=True)
    sequence = torch.tensor([0, 0, 0, 0, 1])
    log_ratio = sequence_log_ratio(logprobs, old, mask, sequence, 2)
    assert log_ratio[:3].tolist() == pytest.approx([0.0] * 3) and log_ratio[4].item() == pytest.approx(0.5)
    loss, binds = gspo_surrogate(logprobs, old, torch.ones(5), mask, sequence, 2, 0.1, 0.1)
    assert binds.tolist()[:3] == [False] * 3 and binds.tolist()[4]  # tokens at 1.35 and 0.74 are not clipped
    assert loss[4].item() == pytest.approx(-1.1)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    logprobs = torch.tensor([0.5, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.0, 0.0], dtype=torch.float64)
    loss, cut = cispo_surrogate(logprobs, old, torch.tensor([2.0, 1.0], dtype=torch.float64), 1.0, 0.2)
    loss.sum().backward()
    assert cut.tolist() == [True, False]  # clip_low 1: no lower bound
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1.2 * 2.0, -math.exp(-3.0)])


def test_rollout_weights() -> None:
    old = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    rollout = torch.tensor([math.log(0.25), math.log(2.0), 0.0, math.nan])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sequence = torch.tensor([0, 0, 1, 0])  # ratios 4 and 0.5: product 2, geometric mean 1.414; and 1
    for options, weights, cut in (
        ({"correction": "decoupled"}, [4.0, 0.5, 1.0, 1.0], [False] * 4),
        ({"correction": "truncate", "largest": 2.0}, [2.0, 0.5, 1.0, 1.0], [True, False, False, False]),
        ({"correction": "mask", "largest": 2.0}, [0.0, 0.5, 1.0, 1.0], [True, False, False, False]),
        ({"correction": "mask", "largest": 5.0, "smallest": 0.6}, [4.0, 0.0, 1.0, 1.0], [False, True, False, False]),
        ({"correction": "sequence_truncate", "largest": 3.0}, [2.0, 2.0, 1.0, 2.0], [False] * 4),
        ({"correction": "sequence_truncate", "largest": 1.5}, [1.5, 1.5, 1.0, 1.5], [True, True, False, True]),
        ({"correction": "sequence_mask", "largest": 1.5}, [0.0, 0.0, 1.0, 0.0], [True, True, False, True]),
        (
            {"correction": "sequence_mask", "largest": 3.0, "smallest": 1.1},
            [2.0, 2.0, 0.0, 2.0],
            [False, False, True, False],
        ),
        ({"correction": "geometric_mask", "largest": 1.4}, [0.0, 0.0, 1.0, 0.0], [True, True, False, True]),
        ({"correction": "geometric_mask", "largest": 1.42}, [1.0] * 4, [False] * 4),
    ):
        got, where = rollout_weights(old, rollout, mask, sequence, 2, **options)  # type: ignore[arg-type]
        assert got.tolist() == pytest.approx(weights) and where.tolist() == cut, options
        assert not got.requires_grad
    with pytest.raises(ValueError, match="needs the largest weight"):
        rollout_weights(old, rollout, mask, sequence, 2, "truncate")


def test_weights_of_long_samples_do_not_overflow() -> None:
    """A product over thousands of tokens leaves float32 long before a mean does."""
    old, mask, sequence = torch.zeros(4000), torch.ones(4000), torch.zeros(4000, dtype=torch.int64)
    weights, cut = rollout_weights(old, old - 0.5, mask, sequence, 1, "sequence_truncate", largest=2.0)
    assert (weights == 2.0).all() and cut.all()
    weights, _ = rollout_weights(old, old + 0.5, mask, sequence, 1, "sequence_truncate", largest=2.0)
    assert (weights > 0).all() and (weights < 1e-8).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_loss_and_in_reward_are_the_same_estimate(estimator: Any) -> None:
    rows = Rows(samples=10)
    in_loss = kl_divergence(torch.tensor(rows.logprobs), torch.tensor(rows.reference), estimator)
    in_reward = kl.token_kl([rows.logprobs], [rows.reference], [np.ones(len(rows.old), dtype=np.bool_)], estimator)
    np.testing.assert_allclose(in_loss, in_reward[0], atol=1e-12)


def test_what_the_gradients_of_the_estimators_are() -> None:
    """Expected over all tokens of a distribution: k1 none, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=6), requires_grad=True)
    reference = torch.tensor(np.log(rng.dirichlet(np.ones(6))))

    def gradient(of: Any) -> np.ndarray:
        logits.grad = None
        logprobs = torch.log_softmax(logits, 0)
        of(logprobs, logprobs.exp().detach()).sum().backward()
        assert logits.grad is not None
        return logits.grad.numpy().copy()

    estimated = {
        how: gradient(lambda p, weight, how=how: weight * kl_divergence(p, reference, how))
        for how in ("k1", "k2", "k3")
    }
    np.testing.assert_allclose(estimated["k1"], 0.0, atol=1e-12)
    np.testing.assert_allclose(estimated["k2"], gradient(lambda p, _: p.exp() * (p - reference)), atol=1e-12)
    np.testing.assert_allclose(estimated["k3"], gradient(lambda p, _: reference.exp() * (reference - p)), atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip: float | None) -> None:
    rng = np.random.default_rng(0)
    old, returns = rng.normal(size=40), rng.normal(size=40)
    at = old + rng.choice([-0.7, -0.1, 0.1, 0.7], 40)

    def by_hand(v: np.ndarray) -> np.ndarray:
        plain = (v - returns) ** 2
        return plain / 2 if clip is None else np.maximum(plain, (np.clip(v, old - clip, old + clip) - returns) ** 2) / 2

    values = torch.tensor(at, requires_grad=True)
    loss, binds = clipped_value_loss(values, torch.tensor(old), torch.tensor(returns), clip)
    np.testing.assert_allclose(loss.detach(), by_hand(at), atol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(values.grad, finite_differences(lambda v: by_hand(v).sum(), at), atol=1e-6)
    assert binds.any() == (clip is not None)


def test_explained_variance() -> None:
    returns = [np.array([1.0, 2.0, 99.0]), np.array([4.0])]
    masks = [np.array([True, True, False]), np.array([True])]
    keep = np.array([True, True])
    assert explained_variance(returns, returns, masks, keep) == 1.0
    assert explained_variance([np.zeros(3), np.zeros(1)], returns, masks, keep) == 0.0
    assert math.isnan(explained_variance(returns, returns, masks, np.array([False, True])))


# -- reward models -----------------------------------------------------------------------------------------

LABELS = torch.tensor([1.0, 0.3, 0.0, 0.0, 1.0, 0.75], dtype=torch.float64)


def sigma(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


REWARD_LOSSES: dict[str, tuple[Any, Any]] = {
    "cross_entropy": (
        lambda s: cross_entropy(s, LABELS),
        lambda s: -LABELS.numpy() * np.log(sigma(s)) - (1 - LABELS.numpy()) * np.log(sigma(-s)),
    ),
    "sigmoid": (lambda s: links.sigmoid(s[:3], s[3:]), lambda s: -np.log(sigma(s[:3] - s[3:]))),
    "nca": (
        lambda s: links.nca(s[:3], s[3:]),
        lambda s: -np.log(sigma(s[:3])) - (np.log(sigma(-s[:3])) + np.log(sigma(-s[3:]))) / 2,
    ),
    "kto": (
        lambda s: kto(s, LABELS, torch.tensor(0.2), desirable_weight=1.3, undesirable_weight=0.7),
        lambda s: 1.3 * LABELS.numpy() * sigma(0.2 - s) + 0.7 * (1 - LABELS.numpy()) * sigma(s - 0.2),
    ),
}


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_reward_model_losses(name: str) -> None:
    ours, by_hand = REWARD_LOSSES[name]
    at = np.random.default_rng(1).normal(size=6) * 2
    scores = torch.tensor(at, requires_grad=True)
    loss = ours(scores)
    np.testing.assert_allclose(loss.detach(), by_hand(at), atol=1e-7)
    loss.sum().backward()
    np.testing.assert_allclose(scores.grad, finite_differences(lambda s: by_hand(s).sum(), at), atol=1e-6)
    bf16 = ours(torch.tensor(at, dtype=torch.bfloat16))
    assert bf16.dtype == torch.float32


def test_sums_of_samples_ignore_untrained_rows() -> None:
    ratios = torch.tensor([0.5, math.nan, -1.0], requires_grad=True)
    sums = sample_sums(ratios, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]), 3)
    assert sums.tolist() == [0.5, -1.0, 0.0]
    sums.sum().backward()
    assert ratios.grad is not None and ratios.grad.tolist() == [1.0, 0.0, 1.0]


def test_pairs_and_kto_baseline() -> None:
    chosen, rejected = correct_incorrect_pairs(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1]))
    assert list(zip(chosen.tolist(), rejected.tolist(), strict=True)) == [(0, 1), (0, 2)]
    assert kto_baseline(torch.tensor([-1.0, -2.0])).item() == 0.0
    assert kto_baseline(torch.tensor([1.0, 2.0], requires_grad=True)).requires_grad is False
