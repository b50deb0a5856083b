"""Preference optimisation: what is compared, refusals, the first loss, held-out pairs."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from preference_fixture import ORDER, TRL, flat, group, loss_of, preference, recorded_pairs, step
from pydantic import ValidationError

from algorithms.preference import Preference
from rlkit.experience import Group, PreferencePair, UserError

RECIPES = Path(__file__).parent.parent.parent / "conf" / "algorithm"


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("auto", [[2, 0], [5, 4]]),
        ("best_worst", [[2, 0], [4, 5]]),
        ("all", [[2, 0], [2, 3], [3, 0], [4, 5]]),
        ("adjacent", [[2, 3], [3, 0], [4, 5]]),
        ("judge", [[5, 4]]),
    ],
)
def test_pairs(pairs: str, expected: list[list[int]]) -> None:
    """The first group has scores and an invalid sample; the second a preference against its scores."""
    groups = [
        group("p", (1,) * 4, (0.0, None, 2.0, 1.0)),
        group("q", (1,) * 2, (1.0, 0.0), [PreferencePair(0, 1, 0.25)]),
    ]
    advantages = preference(pairs=pairs).advantages(step(groups))
    assert advantages.pairs is not None and advantages.pairs.tolist() == expected
    assert set(np.flatnonzero(advantages.keep)) == {i for pair in expected for i in pair}
    if pairs in ("auto", "judge"):
        assert advantages.pair_values["probability"][-1] == pytest.approx(0.75)
    advantages.check(step(groups), preference())


def test_values_of_recorded_pairs_reach_the_link() -> None:
    recorded = [group("p", (1, 1), (1.0, 0.0), [PreferencePair(0, 1, 0.8, margin=0.3, weight=2.0)])]
    values = preference(label_smoothing=0.1).advantages(step(recorded)).pair_values
    assert values["probability"] == pytest.approx([0.8 * 0.9 + 0.2 * 0.1])
    assert values["margin"] == pytest.approx([0.3])
    output = loss_of(preference(beta=1.0), step(recorded), torch.tensor([0.5, 0.1]), torch.zeros(2))
    z = 0.4 - 0.3
    soft = 0.8 * math.log1p(math.exp(-z)) + 0.2 * math.log1p(math.exp(z))
    assert output.loss.item() == pytest.approx(2 * soft, abs=1e-6)


def test_a_link_of_hard_labels_takes_wins_only() -> None:
    pairs = [PreferencePair(0, 1, 0.5), PreferencePair(2, 1, 0.9)]
    advantages = preference(link="nca").advantages(step([group("p", (1,) * 3, (0.0,) * 3, pairs)]))
    assert advantages.pairs is not None and advantages.pairs.tolist() == [[2, 1]]


def test_untrained_tokens_are_not_in_scores_or_lengths() -> None:
    masked = group("p", (3, 2), (1.0, 0.0), masks={0: [True, False, True]})
    algorithm = preference(length_normalised=True, beta=1.0)
    experience = step([masked])
    assert algorithm.advantages(experience).metrics["preference/chosen_length"] == 2
    policy = torch.tensor([0.2, math.nan, 0.4, 0.1, 0.1])
    output = loss_of(algorithm, experience, policy, torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0]))
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(-0.2)), abs=1e-6)


def test_a_step_without_pairs_teaches_nothing() -> None:
    advantages = preference().advantages(step([group("p", (1, 1), (1.0, 1.0))]))
    assert not advantages.keep.any() and advantages.metrics["preference/pairs"] == 0
    assert advantages.metrics["preference/paired_share"] == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect with link=ipo"),
        ({"link": "exo"}, "exo needs label_smoothing above 0"),
        ({"link": "orpo"}, "reference=none and length_normalised=true"),
        ({"target_margin": 1.0}, "target_margin has no effect with link=sigmoid reference=frozen"),
        ({"link": "kto", "reference": "none"}, "set reference=frozen"),
        ({"link": "kto", "pairs": "all"}, "pairs has no effect with link=kto"),
        ({"link": "kto", "nll_coefficient": 1.0}, "nll_coefficient has no effect"),
        ({"link": "hinge", "labels": "gain"}, "labels has no effect with link=hinge"),
        ({"clip": 0.1}, "clip has no effect with link=sigmoid"),
        ({"desirable_weight": 2.0}, "desirable_weight has no effect with link=sigmoid"),
        ({"ld_alpha": 0.5, "length_normalised": True}, "ld_alpha weights sums"),
        ({"guide": "x", "reference": "none"}, "guide weights sums"),
        ({"guide_weight": 1.0}, "guide_weight has no effect with guide=null"),
        ({"dynamic_beta_rate": 1.0}, "dynamic_beta_rate has no effect with dynamic_beta=0"),
        ({"token_reward_coefficient": 0.1, "reference": "none"}, "token_reward_coefficient has no effect"),
        ({"worse_prompt": "?"}, "worse_prompt has no effect"),
        ({"labels": "agreement", "pairs": "all"}, "pairs has no effect with labels=agreement"),
        ({"reference": "none", "reference_every_steps": 5}, "reference_every_steps has no effect"),
        ({"link": "sigmod"}, "did you mean sigmoid"),
        ({"link": "json.dumps"}, "must take either chosen and rejected, or scores"),
        ({"beta": 0.0}, "greater than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Preference.Config(**options)


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({"pairs": "judge"}, group("p", (1, 1), (1.0, 0.0)), "compares responses"),
        (
            {"link": "hinge"},
            group("p", (1, 1), (1.0, 0.0), [PreferencePair(0, 1, margin=1.0)]),
            "takes no margins, but the data have some",
        ),
        ({"link": "kto"}, group("p", (1, 1), (1.5, 0.0)), "a score of 1.5"),
    ],
)
def test_scores_that_do_not_fit_are_refused(options: dict[str, Any], asked: Group, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preference(**options).advantages(step([asked]))


def test_a_link_of_one_s_own() -> None:
    assert preference(link="algorithms.functional.links.hinge").needs().layout == "pairs"


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_recipes_are_valid(recipe: str) -> None:
    content = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    section = content.get("algorithm", content)
    if section.pop("_target_") == "algorithms.preference.Preference":
        algorithm = preference(**{key: "/models/guide" if value == "???" else value for key, value in section.items()})
        assert "data" in algorithm.needs().sources


# -- the first loss, and held-out pairs --------------------------------------------------------------------------------


def test_the_first_loss_is_what_theory_gives(caplog: pytest.LogCaptureFixture) -> None:
    algorithm, policy = preference(), flat(TRL["policy"])
    output = loss_of(algorithm, step(recorded_pairs(), number=1), policy, policy)
    assert output.loss.item() == pytest.approx(math.log(2))
    assert output.sums["preference/accuracy"].item() == 0.5  # ties
    metrics = {name: float(value) for name, value in output.sums.items()} | {"policy/optimizer_steps": 1.0}
    assert metrics["preference/loss_at_start"] == pytest.approx(math.log(2))
    later = loss_of(algorithm, step(recorded_pairs(), number=2), policy, policy)
    assert "preference/loss_at_start" not in later.sums
    with caplog.at_level(logging.WARNING):
        algorithm.observe(metrics)
        algorithm.observe({**metrics, "preference/loss": 0.9, "policy/optimizer_steps": 8.0})  # later optimizer steps
        assert not caplog.records
        algorithm.observe({**metrics, "preference/loss": 0.72})
    assert "the first loss is 0.7200, but should be 0.6931 while" in caplog.text


def test_heldout_pairs_are_measured_without_further_terms() -> None:
    algorithm = preference(beta=0.5, nll_coefficient=1.0)
    rows = {name: [np.array(TRL[name][i], np.float32) for i in ORDER] for name in ("policy", "reference")}
    experience = replace(step(recorded_pairs()), policy_logprobs=rows["policy"], reference_logprobs=rows["reference"])
    measured = algorithm.heldout(experience)
    output = loss_of(preference(beta=0.5), step(recorded_pairs()), flat(TRL["policy"]), flat(TRL["reference"]))
    assert next(iter(measured)) == "preference/heldout_accuracy"
    for name in ("accuracy", "margin", "loss"):
        assert measured[f"preference/heldout_{name}"] == pytest.approx(
            output.sums[f"preference/{name}"].item(), abs=1e-5
        )


def test_heldout_labels_are_measured_by_pairs_or_by_the_score_s_sign() -> None:
    algorithm, rows = preference(link="kto", beta=0.5), [np.array([x], np.float32) for x in (1.0, 0.5, -0.5, 0.0)]
    zeros = [np.zeros(1, np.float32)] * 4
    together = [group("p", (1, 1), (1.0, 0.0)), group("q", (1, 1), (1.0, 0.0))]
    experience = replace(step(together), policy_logprobs=rows, reference_logprobs=zeros)
    assert algorithm.heldout(experience) == {
        "preference/heldout_accuracy": 0.5,
        "preference/heldout_margin": pytest.approx(0.5 * (0.5 - 0.5) / 2),
    }
    apart = [group(name, (1,), (label,)) for name, label in zip("pqrs", (1.0, 0.0, 0.0, 1.0), strict=True)]
    experience = replace(step(apart), policy_logprobs=rows, reference_logprobs=zeros)
    assert algorithm.heldout(experience) == {"preference/heldout_accuracy": (1 + 0 + 1 + 0.5) / 4}
