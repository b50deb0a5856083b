"""What the ranks hand back of each token: as the update used it, of its first pass over a sample."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import build_learner, grpo_advantages, make_groups, write_tiny_model

from algorithms.base import Advantages, Algorithm, Denominators, Experience, LossInputs
from algorithms.functional.surrogates import SURROGATES
from algorithms.grpo import GRPO
from algorithms.preference import Preference
from algorithms.sft import SFT
from rlkit.experience import Group, GroupScores, Score
from rlkit.learner.signals import joined
from rlkit.tracking.tokens import Signals


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


def numbers(groups: list[Group]) -> range:
    return range(sum(len(group.samples) for group in groups))


def signals_of(learner: Any, groups: list[Group], advantages: Advantages, **known: Any) -> Signals:
    learner.update(groups, advantages, watched=numbers(groups), **known)
    return joined([learner.watch.seen()])


def without_invalid(groups: list[Group]) -> list[Group]:
    return groups[1:]


def rewarded(group: Group, *rewards: float) -> Group:
    return group.with_scores(GroupScores(tuple(map(Score, rewards))))


def test_the_learners_values_are_those_of_the_weights_before_the_step(model: Path) -> None:
    """Two mini-batches, small micro-batches, three epochs: the ratio is that of the first pass over each sample."""
    groups = without_invalid(make_groups(5, longest=12))
    advantages = grpo_advantages(groups)
    options = {"learning_rate": 0.01, "algorithm": GRPO(GRPO.Config(samples_per_prompt=4, kl_coefficient=0.1))}
    learner = build_learner(
        model, minibatches_per_step=2, epochs_per_step=3, tokens_per_microbatch=40, **options  # type: ignore[arg-type]
    )  # fmt: skip
    before = learner.group_logprobs(groups)
    signals = signals_of(learner, groups, advantages, old_logprobs=before, seed=(1,))
    assert set(signals) == set(numbers(groups))
    first = build_learner(model, **options)  # type: ignore[arg-type]
    first.update(groups[:2], grpo_advantages(groups[:2]))
    between = [*before[:8], *first.group_logprobs(groups)[8:]]
    for i, rows in signals.items():
        assert rows.keys() == {"logprob_learner", "entropy", "ratio", "clipped", "logprob_reference"}
        np.testing.assert_allclose(rows["logprob_learner"], before[i], atol=1e-5)
        np.testing.assert_allclose(rows["logprob_reference"], before[i], atol=1e-5)
        np.testing.assert_allclose(rows["ratio"], np.exp(between[i] - before[i]), atol=1e-3)
        assert (rows["entropy"] > 0).all() and (rows["entropy"] < math.log(60)).all()
    moved = np.concatenate([signals[i]["ratio"] for i in range(8, 16)])
    assert np.abs(moved - 1).max() > 0.01, "the second mini-batch came after an optimizer step"
    assert np.concatenate([signals[i]["ratio"] for i in range(8)]) == pytest.approx(1, abs=1e-4)


def test_only_watched_samples_are_kept_and_silent_ones_have_none(model: Path) -> None:
    groups = make_groups(3)
    equal = rewarded(groups[2], 1.0, 1.0, 1.0, 1.0)
    learner = build_learner(model, algorithm=GRPO(GRPO.Config(samples_per_prompt=4, kl_coefficient=0)))
    step = [groups[0], groups[1], equal]
    learner.update(step, grpo_advantages(step), watched={1, 2, 5, 9})
    signals = joined([learner.watch.seen()])
    assert set(signals) == {2, 5}, "sample 1 is invalid, sample 9 has advantage 0 on every token"
    assert {i: len(rows["entropy"]) for i, rows in signals.items()} == {
        2: len(groups[0].samples[2]), 5: len(groups[1].samples[1])
    }  # fmt: skip
    learner.update(step, grpo_advantages(step))
    assert joined([learner.watch.seen()]) == {}


def test_weights_for_stale_samples_are_those_of_the_loss(model: Path) -> None:
    correction = {"rollout_correction": "truncate", "largest_weight": 2.0}
    learner = build_learner(model, algorithm=GRPO(GRPO.Config(samples_per_prompt=4, **correction)))  # type: ignore[arg-type]
    groups = without_invalid(make_groups(3))
    before = learner.group_logprobs(groups)
    signals = signals_of(learner, groups, grpo_advantages(groups))
    samples = [sample for group in groups for sample in group.samples]
    expected = [np.minimum(np.exp(row - sample.sampled), 2.0) for row, sample in zip(before, samples, strict=True)]
    assert 0 < (np.concatenate(expected) == 2.0).mean() < 1
    for i, row in signals.items():
        np.testing.assert_allclose(row["weight"], expected[i], rtol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "names"),
    [
        (Preference(Preference.Config(pairs="all")), {"logprob_learner", "entropy", "logprob_reference"}),
        (Preference(Preference.Config(link="kto")), {"logprob_learner", "entropy", "logprob_reference"}),
        (SFT(SFT.Config()), {"logprob_learner", "entropy"}),
        (GRPO(GRPO.Config(loss="policy_gradient", kl_coefficient=0)), {"logprob_learner", "entropy", "clipped"}),
    ],
)
def test_what_a_loss_does_not_have_is_left_out(model: Path, algorithm: Algorithm, names: set[str]) -> None:
    groups = [rewarded(group, 0.0, 1.0, 0.0, 1.0) for group in without_invalid(make_groups(3))]
    learner = build_learner(model, algorithm=algorithm)
    passes = {
        name: learner.group_logprobs(list(algorithm.groups_for(name, groups, lambda messages: ())))
        for name in algorithm.needs().passes
    }
    before = learner.group_logprobs(groups)
    signals = signals_of(learner, groups, algorithm.advantages(Experience(groups, 1, logprobs=passes)))
    assert signals
    for i, rows in signals.items():
        assert rows.keys() == names
        np.testing.assert_allclose(rows["logprob_learner"], before[i], atol=1e-5)


# against worked numbers


RATIOS = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
ADVANTAGES = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
STALE = torch.tensor([4.0, 1.0, 0.5, 1.0, 3.0, 1.0])


def decided(**options: Any) -> dict[str, torch.Tensor]:
    """Of two samples of three tokens with these ratios, advantages and distances from the sampler."""
    old = torch.full((6,), -2.0)
    inputs = LossInputs(
        logprobs=(old + RATIOS.log()).requires_grad_(),
        entropy=torch.ones(6),
        old_logprobs=old,
        rollout_logprobs=old - STALE.log(),
        advantages=ADVANTAGES,
        mask=torch.ones(6),
        sequence=torch.tensor([0, 0, 0, 1, 1, 1]),
        group=torch.zeros(2, dtype=torch.int64),
        denominators=Denominators(6.0, 2.0, 1.0),
    )
    rows = GRPO(GRPO.Config(samples_per_prompt=2, kl_coefficient=0, **options)).loss(inputs).rows
    assert not any(row.requires_grad for row in rows.values())
    return dict(rows)


def test_clipping_ratio_and_weights_are_the_surrogates_own() -> None:
    rows = decided(clip_low=0.2, clip_high=0.2)
    assert rows.keys() == {"clipped", "ratio"}
    assert rows["clipped"].tolist() == [False, False, True, True, False, False]
    assert rows["ratio"].tolist() == pytest.approx(RATIOS.tolist())
    rows = decided(rollout_correction="truncate", largest_weight=2.0)
    assert rows["weight"].tolist() == pytest.approx([2.0, 1.0, 0.5, 1.0, 2.0, 1.0])
    rows = decided(rollout_correction="sequence_truncate", largest_weight=2.5)
    assert rows["weight"].tolist() == pytest.approx([2.0] * 3 + [2.5] * 3)
    rows = decided(anchor="rollout")
    assert rows["ratio"].tolist() == pytest.approx((RATIOS * STALE).tolist())
    rows = decided(loss="dppo")
    assert rows["ratio"].tolist() == pytest.approx((RATIOS * STALE).tolist())


@pytest.mark.parametrize("loss", sorted(set(SURROGATES) - {"clip_cov", "kl_cov"}))
def test_every_surrogate_says_what_it_decided(loss: str) -> None:
    options = {"clip_high": 0.2, "clip_low": 0.2} if loss in ("clipped", "gspo", "cispo", "gmpo") else {}
    rows = decided(loss=loss, **options)
    assert rows["clipped"].dtype == torch.bool
    assert ("ratio" in rows) == (loss != "policy_gradient")
