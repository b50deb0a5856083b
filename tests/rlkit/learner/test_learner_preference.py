"""Updates by pairs and labels on one rank: what must not change them, and what the first loss is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import build_learner, make_groups, smooth_steps, weights_of, write_tiny_model

from algorithms.base import Experience
from algorithms.preference import Preference
from rlkit.experience import Group, GroupScores, PreferencePair, Score

PREFERENCES: dict[str, dict[str, Any]] = {
    "all pairs": {"pairs": "all", "beta": 1.0, "label_smoothing": 0.1, "nll_coefficient": 0.5},
    "recorded pairs": {"pairs": "judge", "beta": 1.0, "ld_alpha": 0.5},
    "labels": {"link": "kto", "beta": 1.0},
    "groups": {"link": "pacs", "beta": 1.0, "reference": "old", "balance_classes": True},
}
Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    """Recorded: nobody sampled them. Ragged, one sample invalid, one partly masked, one whole."""
    groups = []
    for g, group in enumerate(make_groups(count=5, seed=3)):
        samples = [replace(sample, logprobs=None) for sample in group.samples]
        if g == 2:
            samples[0] = replace(samples[0], mask=np.arange(len(samples[0])) % 3 != 1)
            samples[1] = replace(samples[1], mask=np.zeros(len(samples[1]), dtype=np.bool_))
        labels = [score if score.value is None else Score(float(i % 2)) for i, (_, score) in enumerate(group.scored())]
        pairs = (PreferencePair(3, 0, 0.9, margin=0.2), PreferencePair(3, 2, weight=2.0))
        groups.append(replace(group, samples=tuple(samples), scores=GroupScores(tuple(labels), pairs)))
    return groups


def two_updates(model: Path, groups: list[Group], preference: str, **options: Any) -> Outcome:
    algorithm = Preference(Preference.Config(**PREFERENCES[preference]))
    learner = smooth_steps(build_learner(model, algorithm=algorithm, learning_rate=0.1, **options))
    metrics = []
    for step in (1, 2):
        passes = {
            name: learner.group_logprobs(list(algorithm.groups_for(name, groups, lambda messages: ())), one.model)
            for name, one in algorithm.needs().passes.items()
        }
        advantages = algorithm.advantages(Experience(groups, step, logprobs=passes))
        metrics.append({**advantages.metrics, **learner.update(groups, advantages)})
    return metrics, weights_of(learner)


@pytest.fixture(scope="module")
def baselines(model: Path, groups: list[Group]) -> dict[str, Outcome]:
    return {name: two_updates(model, groups, name) for name in PREFERENCES}


def reversed_samples(groups: list[Group]) -> list[Group]:
    turned = []
    for group in groups:
        assert group.scores is not None
        last = len(group.samples) - 1
        pairs = tuple(replace(p, winner=last - p.winner, loser=last - p.loser) for p in group.scores.pairs)
        scores = GroupScores(group.scores.samples[::-1], pairs)
        turned.append(replace(group, samples=group.samples[::-1], scores=scores))
    return turned


def unchanged(groups: list[Group]) -> list[Group]:
    return groups


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"tokens_per_microbatch": 60}, unchanged),
        ({"tokens_per_microbatch": 1}, unchanged),  # every group, or every sample with labels, is a micro-batch
        ({"tokens_per_microbatch": 60, "zero_stage": 2}, unchanged),
        ({"tokens_per_microbatch": 40, "gradient_checkpointing": True}, lambda groups: groups[::-1]),
        ({"tokens_per_microbatch": 40}, reversed_samples),
    ],
)
def test_an_update_does_not_depend_on(
    model: Path,
    groups: list[Group],
    baselines: dict[str, Outcome],
    preference: str,
    options: dict[str, Any],
    change: Callable[[list[Group]], list[Group]],
) -> None:
    if preference == "labels" and change is not unchanged:
        pytest.skip("KTO's baseline pairs responses with the next prompt: another order is another estimate")
    expected, expected_weights = baselines[preference]
    got, weights = two_updates(model, change(groups), preference, **options)
    for want, have in zip(expected, got, strict=True):
        assert want.keys() == have.keys()
        for name, value in want.items():
            assert have[name] == pytest.approx(value, rel=3e-4, abs=3e-6), name
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-5, rtol=1e-4)


def test_it_starts_where_theory_says_and_learns(baselines: dict[str, Outcome]) -> None:
    first, second = baselines["recorded pairs"][0]
    margins, weights, p = np.array([0.2, 0.0]), np.array([1.0, 2.0]), np.array([0.9, 1.0])
    losses = weights * (p * np.log1p(np.exp(margins)) + (1 - p) * np.log1p(np.exp(-margins)))
    assert first["preference/loss"] == pytest.approx(losses.mean(), abs=1e-5)
    assert first["preference/loss_at_start"] == pytest.approx(first["preference/loss"], abs=1e-5)
    assert first["preference/margin"] == pytest.approx(0, abs=1e-5)
    assert second["preference/accuracy"] > 0.5 and second["preference/margin"] > 0.01
    assert second["preference/loss"] < first["preference/loss"]
    assert "kl/rollout" not in first and second["kl/reference"] > 0
    labels = baselines["labels"][0]
    assert labels[0]["preference/loss"] == pytest.approx(0.5, abs=1e-4)
    assert labels[1]["preference/loss"] < labels[0]["preference/loss"]
    assert baselines["groups"][0][0]["preference/loss"] == pytest.approx(math.log(2), abs=0.1)
