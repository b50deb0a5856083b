"""SAPO, GMPO, DPPO, Clip-Cov and KL-Cov: values and gradients against numpy, one sample at a time; which tokens the
covariance selects against plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import make_groups
from pydantic import ValidationError
from test_grpo import aggregate_by_hand, finite_differences
from test_losses import StaleRows

from algorithms.base import Advantages, Experience, LossInputs
from algorithms.functional.covariance import ClipCov, KLCov
from algorithms.functional.trust_regions import DPPO, SAPO, gmpo_surrogate
from algorithms.grpo import GRPO
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group, GroupScores, Score

NO_KL: dict[str, Any] = {"kl_coefficient": 0.0}


class SelectedRows(StaleRows):
    """Rows, some of which the covariance has selected."""

    def __init__(self, seed: int = 0, samples: int = 5) -> None:
        super().__init__(seed, samples)
        rng = np.random.default_rng(seed + 2000)
        self.selected = (rng.random(len(self.old)) < 0.4).astype(np.float64)
        near = (self.mask > 0) & (rng.random(len(self.mask)) < 0.5)
        self.rollout[near] = np.minimum(self.old[near], -0.4) + 0.3  # likely tokens, whose probability has fallen

    def inputs(self, dtype: torch.dtype = torch.float64, rows: Any = slice(None)) -> LossInputs:
        selected = torch.tensor(self.selected[rows], dtype=dtype)
        return replace(super().inputs(dtype, rows), extras={"selected": selected})


def sapo_by_hand(rows: SelectedRows, config: GRPO.Config, logprobs: np.ndarray) -> np.ndarray:
    options = config.loss_options or {}
    positive, negative = options.get("positive_temperature", 1.0), options.get("negative_temperature", 1.05)
    t = np.where(rows.advantages > 0, positive, negative)
    return -rows.advantages * 4 / t / (1 + np.exp(-t * (np.exp(logprobs - rows.old) - 1)))


def gmpo_by_hand(rows: SelectedRows, config: GRPO.Config, logprobs: np.ndarray) -> np.ndarray:
    losses = np.zeros_like(logprobs)
    for s in np.unique(rows.sequence):
        mine = np.flatnonzero((rows.sequence == s) & (rows.mask > 0))
        if len(mine):
            a, ratio = rows.advantages[mine[0]], np.exp(logprobs[mine] - rows.old[mine])
            bound = np.minimum(ratio, 1 + config.clip_high) if a > 0 else np.maximum(ratio, 1 - config.clip_low)
            losses[mine] = -a * np.prod(bound) ** (1 / len(mine))
    return losses


def dppo_by_hand(rows: SelectedRows, config: GRPO.Config, logprobs: np.ndarray) -> np.ndarray:
    """Where the tokens are is fixed: a finite difference moves the log-prob alone, as the gradient does."""
    options = config.loss_options or {}
    losses = np.zeros_like(logprobs)
    for i in np.flatnonzero(rows.mask):
        pi, mu, a = math.exp(rows.logprobs[i]), math.exp(rows.rollout[i]), rows.advantages[i]
        if options.get("divergence", "tv") == "tv":
            out = abs(pi - mu) > options.get("threshold", 0.15)
        else:
            out = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi)) > options.get("threshold", 0.05)
        if not (out and a * (pi - mu) > 0):
            losses[i] = -min(pi / mu, options.get("largest_ratio", 20.0)) * a * logprobs[i]
    return losses


def clip_cov_by_hand(rows: SelectedRows, config: GRPO.Config, logprobs: np.ndarray) -> np.ndarray:
    ratio = np.exp(logprobs - rows.old)
    clipped = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    return np.where(rows.selected > 0, 0.0, -np.minimum(ratio * rows.advantages, clipped * rows.advantages))


def kl_cov_by_hand(rows: SelectedRows, config: GRPO.Config, logprobs: np.ndarray) -> np.ndarray:
    coefficient = (config.loss_options or {}).get("coefficient", 1.0)
    penalty = coefficient * np.abs(logprobs - rows.old) * rows.selected
    return -np.exp(logprobs - rows.old) * rows.advantages + penalty


CASES: list[tuple[GRPO.Config, Any]] = [
    (GRPO.Config(loss="sapo", loss_options={"positive_temperature": 3}, **NO_KL), sapo_by_hand),
    (GRPO.Config(loss="sapo", loss_options={"negative_temperature": 6}, **NO_KL), sapo_by_hand),
    (GRPO.Config(loss="gmpo", clip_low=0.33, clip_high=0.49, **NO_KL), gmpo_by_hand),
    (GRPO.Config(loss="dppo", aggregation="token_mean", **NO_KL), dppo_by_hand),
    (GRPO.Config(loss="dppo", loss_options={"divergence": "kl"}, **NO_KL), dppo_by_hand),
    (GRPO.Config(loss="dppo", loss_options={"threshold": 0.02, "largest_ratio": 1.5}, **NO_KL), dppo_by_hand),
    (GRPO.Config(loss="clip_cov", **NO_KL), clip_cov_by_hand),
    (GRPO.Config(loss="kl_cov", loss_options={"coefficient": 0.3}, aggregation="token_mean", **NO_KL), kl_cov_by_hand),
]
named = pytest.mark.parametrize(("config", "by_hand"), CASES, ids=[f"{c.loss} {c.loss_options}" for c, _ in CASES])


@named
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients(config: GRPO.Config, by_hand: Any, dtype: torch.dtype) -> None:
    bound = 0.0
    for seed in range(4):
        rows = SelectedRows(seed, samples=8)
        inputs = rows.inputs(dtype)
        output = GRPO(config).loss(inputs)
        output.loss.backward()

        def loss(logprobs: np.ndarray, rows: SelectedRows = rows) -> float:
            counts = rows.denominators
            losses = by_hand(rows, config, logprobs)
            how = config.aggregation
            return aggregate_by_hand(losses, rows.mask, rows.sequence, counts.tokens, counts.sequences, how)

        assert output.loss.item() == pytest.approx(loss(rows.logprobs), abs=1e-5)
        assert inputs.logprobs.grad is not None
        np.testing.assert_allclose(inputs.logprobs.grad, finite_differences(loss, rows.logprobs), atol=1e-5)
        bound += output.sums["policy/clip_share"].item()
    assert 0 < bound < 4, "a bound that never or always binds is not tested"


@named
def test_micro_batches_add_up(config: GRPO.Config, by_hand: Any) -> None:
    rows, algorithm = SelectedRows(3, samples=6), GRPO(config)
    whole_inputs = rows.inputs()
    whole = algorithm.loss(whole_inputs)
    whole.loss.backward()
    loss, sums, gradient = 0.0, dict.fromkeys(whole.sums, 0.0), np.zeros_like(rows.logprobs)
    for chosen in ([4, 0], [5], [2, 3, 1]):
        members = np.concatenate([np.flatnonzero(rows.sequence == s) for s in chosen])
        inputs = rows.inputs(rows=members)
        output = algorithm.loss(inputs)
        output.loss.backward()
        loss += output.loss.item()
        gradient[members] = inputs.logprobs.grad
        sums = {name: value + output.sums[name].item() for name, value in sums.items()}
    assert loss == pytest.approx(whole.loss.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, whole_inputs.logprobs.grad, atol=1e-12)
    assert sums == pytest.approx({name: value.item() for name, value in whole.sums.items()}, abs=1e-12)


# -- worked numbers ----------------------------------------------------------------------------------------


def test_sapo_at_ratio_one_has_the_gradient_of_ppo_and_fades_on_both_sides() -> None:
    surrogate = SAPO(SAPO.Config(positive_temperature=1.0, negative_temperature=2.0))
    logprobs = torch.tensor([0.0, 0.0, math.log(3.0), -2.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -1.5, 1.0, -1.0], dtype=torch.float64)
    loss, faded = surrogate(logprobs, torch.zeros(4, dtype=torch.float64), advantages)
    assert loss[:2].tolist() == pytest.approx([-3.0, 1.5])  # -A 2 / T
    assert loss[2].item() == pytest.approx(-4 * 0.880797078)  # sigmoid(1 (3 - 1))
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[:2].tolist() == pytest.approx([-1.5, 1.5])
    assert logprobs.grad[2].item() == pytest.approx(-3 * 4 * 0.880797078 * (1 - 0.880797078))
    assert faded.tolist() == [False, False, True, False]  # 4 s (1 - s): 1, 1, 0.42, 0.51


def test_gmpo_is_the_root_of_the_product() -> None:
    ratios = torch.tensor([2.0, 0.5, 8.0, 0.125, 7.0], dtype=torch.float64)
    mask, sequence = torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1])
    logprobs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, 1, -2, -2, -2], dtype=torch.float64)
    loss, binds = gmpo_surrogate(logprobs, torch.zeros(5), advantages, mask, sequence, 2, 0.75, 1.0)
    # 2 and 0.5 -> 1; 8 and 0.125, bounded below by 0.25 as A < 0 -> sqrt(2)
    assert loss[:4].tolist() == pytest.approx([-1.0, -1.0, 2 * math.sqrt(2), 2 * math.sqrt(2)])
    assert binds.tolist() == [False, False, False, True, False]
    (loss * mask).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1.0, -1.0, 2 * math.sqrt(2), 0.0, 0.0])


def test_gmpo_without_a_lower_bound() -> None:
    logprobs, one = torch.tensor([-3.0]), torch.ones(1)
    loss, binds = gmpo_surrogate(logprobs, torch.zeros(1), -one, one, torch.zeros(1, dtype=torch.int64), 1, 1.0, 0.2)
    assert loss.item() == pytest.approx(math.exp(-3.0)) and not binds.item()


@pytest.mark.parametrize(("divergence", "threshold"), [("tv", 0.15), ("kl", 0.05)])
def test_dppo_lets_rare_tokens_move_and_holds_likely_ones(divergence: Any, threshold: float) -> None:
    #  now, sampled, advantage: left?
    table = [
        (0.05, 0.01, 1.0, False),  # ratio 5, but little moved
        (0.80, 0.60, 1.0, True),  # ratio 1.33
        (0.80, 0.60, -1.0, False),  # on its way back
        (0.50, 0.75, -1.0, True),
        (0.50, 0.75, 0.0, False),
    ]
    now, sampled, advantages, left = (list(column) for column in zip(*table, strict=True))
    surrogate = DPPO(DPPO.Config(divergence=divergence))
    assert surrogate.threshold == threshold
    logprobs = torch.tensor(now, dtype=torch.float64).log().requires_grad_()
    mu, a = torch.tensor(sampled, dtype=torch.float64).log(), torch.tensor(advantages, dtype=torch.float64)
    loss, binds = surrogate(logprobs, mu, a, torch.ones(5, dtype=torch.float64))
    assert binds.tolist() == left
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-5.0, 0.0, 4 / 3, 0.0, 0.0])


def test_dppo_of_a_certain_token_is_finite() -> None:
    loss, _ = DPPO(DPPO.Config(divergence="kl"))(torch.zeros(1), torch.tensor([-1e-9]), torch.ones(1), torch.ones(1))
    assert torch.isfinite(loss).all()


# -- covariance --------------------------------------------------------------------------------------------


def step_of(groups: list[Group]) -> tuple[Experience, Advantages]:
    experience = Experience(groups, step=1)
    return experience, GRPO(GRPO.Config(**NO_KL)).advantages(experience)


def make_step(seed: int = 5) -> list[Group]:
    """Sampled with log-probs that differ; one sample without a valid score, one partly trained."""
    rng = np.random.default_rng(seed)
    groups = []
    for group in make_groups(count=4, seed=seed):
        samples = tuple(
            replace(
                sample, logprobs=rng.normal(-2, 1.5, len(sample)).astype(np.float32), seed=int(rng.integers(1 << 60))
            )
            for sample in group.samples
        )
        groups.append(replace(group, samples=samples))
    first = groups[0]
    mask = np.arange(len(first.samples[0])) % 2 == 0
    samples = (replace(first.samples[0], mask=mask), *first.samples[1:])
    scores = (Score(1.0), Score.invalid("timeout: test"), *[Score(0.0)] * (len(samples) - 2))
    groups[0] = replace(first, samples=samples, scores=GroupScores(scores))
    return groups


def tokens_by_hand(experience: Experience, credit: Advantages) -> list[tuple[float, tuple[int, int]]]:
    """(covariance, (sample, position)) of every trained token."""
    samples = [sample for group in experience.groups for sample in group.samples]
    tokens = [
        (float(credit.tokens[i][t]), float(sample.logprobs[t]), (i, t))
        for i, sample in enumerate(samples)
        for t in range(len(sample))
        if credit.keep[i] and sample.trained[t]
    ]
    mean_a, mean_p = (sum(column) / len(tokens) for column in list(zip(*tokens, strict=True))[:2])
    return [((a - mean_a) * (p - mean_p), where) for a, p, where in tokens]


def places(selected: dict[str, Any]) -> set[tuple[int, int]]:
    assert list(selected) == ["selected"]
    return {(i, int(t)) for i, row in enumerate(selected["selected"]) for t in np.flatnonzero(row)}


def test_kl_cov_selects_the_largest_covariances() -> None:
    experience, credit = step_of(make_step())
    tokens = sorted(tokens_by_hand(experience, credit), reverse=True)
    for share in (1e-6, 0.1, 1.0):
        count = max(1, int(share * len(tokens)))
        expected = {where for _, where in tokens[:count]}
        assert places(KLCov(KLCov.Config(share=share)).select(experience, credit)) == expected


def test_clip_cov_draws_from_the_band() -> None:
    experience, credit = step_of(make_step())
    tokens = tokens_by_hand(experience, credit)
    band = {where for covariance, where in tokens if 0.2 < covariance < 1.5}
    count = int(0.1 * len(tokens))
    assert 1 < count < len(band) < len(tokens)
    surrogate = ClipCov(ClipCov.Config(share=0.1, low=0.2, high=1.5))
    drawn = places(surrogate.select(experience, credit))
    assert len(drawn) == count and drawn < band
    assert places(surrogate.select(experience, credit)) == drawn
    assert places(ClipCov(ClipCov.Config(share=1.0, low=0.2, high=1.5)).select(experience, credit)) == band
    assert places(ClipCov(ClipCov.Config(low=98.0, high=99.0)).select(experience, credit)) == set()
    others = make_step()
    others = [replace(g, samples=tuple(replace(s, seed=s.seed + 1) for s in g.samples)) for g in others]
    assert places(surrogate.select(*step_of(others))) != drawn, "the draw does not depend on the seeds"


@pytest.mark.parametrize("surrogate", [ClipCov(ClipCov.Config(share=0.1, low=0.2)), KLCov(KLCov.Config(share=0.1))])
def test_the_order_of_groups_changes_no_selection(surrogate: Any) -> None:
    groups = make_step()
    found = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        some = [groups[g] for g in order]
        rows = iter(surrogate.select(*step_of(some))["selected"])
        found.append({(group.id, s.index): next(rows).tolist() for group in some for s in group.samples})
    assert found[0] == found[1]


def test_a_step_without_a_trained_sample_selects_nothing() -> None:
    groups = [g.with_scores(GroupScores((Score.invalid("x: y"),) * len(g.samples))) for g in make_step()]
    experience, credit = step_of(groups)
    assert not credit.keep.any()
    assert places(KLCov(KLCov.Config()).select(experience, credit)) == set()


def test_the_selection_reaches_the_loss() -> None:
    experience = Experience(make_step(), step=1)
    algorithm = GRPO(GRPO.Config(loss="kl_cov", loss_options={"share": 0.1}, **NO_KL))
    credit = algorithm.advantages(experience)
    assert places(dict(credit.extras)) == places(KLCov(KLCov.Config(share=0.1)).select(experience, credit))
    assert GRPO(GRPO.Config(**NO_KL)).advantages(experience).extras == {}


# -- options -----------------------------------------------------------------------------------------------


def test_a_penalty_needs_samples_without_advantages_the_others_do_not() -> None:
    def skips(loss: str) -> bool:
        return GRPO(GRPO.Config(loss=loss, **NO_KL)).needs().skips_zero_advantages

    assert [skips(loss) for loss in ("policy_gradient", "sapo", "gmpo", "dppo", "clip_cov")] == [True] * 5
    assert not skips("kl_cov")


@pytest.mark.parametrize("loss", ["policy_gradient", "sapo", "gmpo", "dppo", "clip_cov"])
def test_without_an_advantage_there_is_no_gradient(loss: str) -> None:
    rows = SelectedRows(1, samples=4)
    rows.advantages = np.zeros_like(rows.advantages)
    inputs = rows.inputs()
    output = GRPO(GRPO.Config(loss=loss, **NO_KL)).loss(inputs)
    output.loss.backward()
    assert output.loss.item() == 0 and inputs.logprobs.grad is not None and not inputs.logprobs.grad.any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=sapo", "algorithm.clip_low=0.1"], "clip_low has no effect with loss=sapo"),
        (["algorithm=dppo", "algorithm.clip_high=0.1"], "clip_high has no effect with loss=dppo"),
        (["algorithm=kl_cov", "algorithm.clip_high=0.1"], "clip_high has no effect with loss=kl_cov"),
        (["algorithm=gpg", "algorithm.clip_high=0.1"], "clip_high has no effect with loss=policy_gradient"),
        (["algorithm=gmpo", "algorithm.dual_clip=3"], "dual_clip has no effect with loss=gmpo"),
        (["algorithm=gmpo", "algorithm.loss_options.share=0.1"], "gmpo takes no options"),
        (
            ["algorithm=sapo", "algorithm.loss_options.positive_temprature=2"],
            "positive_temprature is not an option of sapo; did you mean positive_temperature?",
        ),
        (["algorithm=dppo", "algorithm.loss_options.divergence=js"], "divergence: Input should be 'tv' or 'kl'"),
        (["algorithm=clip_cov", "algorithm.loss_options.low=6"], "low=6.0 is not below high=5.0"),
        (
            ["algorithm=dppo", "algorithm.rollout_correction=truncate", "algorithm.largest_weight=2"],
            "rollout_correction would correct twice: the ratio of loss=dppo is already to the sampler",
        ),
    ],
)
def test_what_has_no_effect_is_refused(overrides: list[str], message: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([*overrides, "reward=rule", f"run_dir={tmp_path / 'run'}"])
    assert message in str(error.value)


def test_options_of_a_built_in_loss_come_from_the_command_line(tmp_path: Any) -> None:
    options = ["algorithm=sapo", "algorithm.loss_options.negative_temperature=1.2", "reward=rule"]
    algorithm: Any = load_config([*options, f"run_dir={tmp_path / 'run'}"]).make_algorithm()
    assert algorithm._surrogate.config == SAPO.Config(negative_temperature=1.2)


def test_dppo_corrects_stale_samples_itself() -> None:
    config = GRPO.Config(loss="dppo", **NO_KL).for_staleness(2)
    assert (config.rollout_correction, config.largest_weight, config.corrects) == ("none", None, True)
    assert "mismatch/weight_mean" not in GRPO(config).loss(SelectedRows(0).inputs()).sums
    with pytest.raises(ValidationError, match="would correct twice"):
        GRPO.Config(loss="dppo", rollout_correction="decoupled", **NO_KL)
