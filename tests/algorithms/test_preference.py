"""Preference optimisation: TRL's losses and gradients, and the numbers of papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from preference_fixture import PAIRS, TRL, flat, group, loss_of, preference, recorded_pairs, step

from algorithms.functional.prompts import mismatched
from rlkit.experience import Group, PreferencePair, UserError

FREE = {"reference": "none"}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_norm": {"length_normalised": True},
    "robust": {"link": "robust"},
    "ipo": {"link": "ipo", "length_normalised": True},
    "hinge": {"link": "hinge"},
    "exo_pair": {"link": "exo"},
    "nca_pair": {"link": "nca"},
    "bco_pair": {"link": "bco"},
    "sppo_hard": {"link": "sppo"},
    "apo_zero": {"link": "apo_zero"},
    "apo_down": {"link": "apo_down"},
    "ld": {},
    "cpo": FREE,
    "cdpo_without_reference": FREE,
    "simpo": FREE | {"length_normalised": True},
    "orpo": FREE | {"link": "orpo", "length_normalised": True, "nll_coefficient": 1.0},
    "kto": {"link": "kto"},
    "apo_zero_unpaired": {"link": "kto"},
}
NAMES = {"simpo_gamma": "target_margin", "cpo_alpha": "nll_coefficient"}
THEIRS = {"loss_type", "calculate_KL"}


@pytest.mark.parametrize("name", TRL["cases"])
def test_trl_gives_the_same_loss_and_gradient(name: str) -> None:
    case = TRL["cases"][name]
    options = {NAMES.get(key, key): value for key, value in case["options"].items() if key not in THEIRS}
    algorithm, experience = preference(**CASES[name], **options), step(recorded_pairs())
    advantages = algorithm.advantages(experience)
    if "kto" in (algorithm.config.link, name):
        z = max(0.0, float(np.mean(TRL["mismatched_scores"])))
        assert z > 0.01
        advantages = replace(advantages, scalars={**advantages.scalars, "baseline": z if name == "kto" else 0.0})
    if name == "bco_pair":
        advantages = replace(advantages, scalars={**advantages.scalars, "shift": 0.0})
    policy = flat(TRL["policy"]).requires_grad_()
    output = loss_of(algorithm, experience, policy, flat(TRL["reference"]), advantages)
    terms = 2 if name == "bco_pair" else 1  # TRL's is per pair
    (terms * output.loss).backward()
    assert terms * output.loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-5)
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, flat(case["gradient"]), rtol=1e-5, atol=1e-5)


def test_what_metrics_say_of_pairs() -> None:
    output = loss_of(preference(beta=0.5), step(recorded_pairs()), flat(TRL["policy"]), flat(TRL["reference"]))
    sums = [sum(np.subtract(p, r)) for p, r in zip(TRL["policy"], TRL["reference"], strict=True)]
    chosen, rejected = np.array(sums[:PAIRS]), np.array(sums[PAIRS:])
    likely = [np.mean(row) for row in TRL["policy"]]
    expected = {
        "preference/accuracy": (chosen > rejected).mean(),
        "preference/margin": 0.5 * (chosen - rejected).mean(),
        "preference/chosen_reward": 0.5 * chosen.mean(),
        "preference/rejected_reward": 0.5 * rejected.mean(),
        "preference/chosen_logprob": np.mean(likely[:PAIRS]),
        "preference/rejected_logprob": np.mean(likely[PAIRS:]),
        "preference/loss": output.loss.item(),
    }
    for name, value in expected.items():
        assert output.sums[name].item() == pytest.approx(value, abs=1e-5), name
    assert 0 < expected["preference/accuracy"] < 1
    assert output.sums["kl/reference"].item() > 0


# -- papers ----------------------------------------------------------------------------------------------------------


def test_tgdpo_through_a_guide() -> None:
    """The worked numbers of the paper's loss: log-ratios and the guide's, the reference at 0."""
    algorithm = preference(guide="/models/guide")
    assert algorithm.needs().passes["guide"].model == "/models/guide"
    experience = step([group("p", (2, 2), (1.0, 0.0))], {"guide": [[1.0, -0.5], [-0.8, 0.4]]})
    output = loss_of(algorithm, experience, torch.tensor([0.5, -0.2, -0.3, 0.1]), torch.zeros(4))
    assert output.loss.item() == pytest.approx(0.666317, abs=1e-6)


def test_treg_through_prompts_that_ask_for_better_and_worse() -> None:
    algorithm = preference(token_reward_coefficient=0.25)
    asked = group("p", (3, 1), (1.0, 0.0))
    better, worse = (
        algorithm.groups_for(name, [asked], lambda messages: tuple(map(len, messages[0].content.split())))[0]
        for name in ("better", "worse")
    )
    assert better.samples is asked.samples and better.prompt.token_ids != worse.prompt.token_ids
    assert better.prompt.messages[0].content.startswith("p\n\n")
    passes = {"better": [[-1.0, -2.0, -0.5], [-1.0]], "worse": [[-2.0, -1.5, -0.5], [-1.0]]}
    policy = torch.tensor([-0.7, -1.2, -0.4, -1.0])
    base = torch.tensor([-1.7, -2.2, -1.4, 0.0])  # s_w = 3, s_l = -1
    output = loss_of(algorithm, step([asked], passes), policy, base)
    plain = loss_of(preference(), step([asked]), policy, base)
    weight = 1 / (1 + math.exp(0.4))
    assert (output.loss - plain.loss).item() == pytest.approx(0.25 * weight * 0.001479, abs=1e-7)
    assert output.sums["preference/loss"] == plain.sums["preference/loss"]


def test_cream_asks_no_reward_and_trusts_rankings_that_agree() -> None:
    algorithm = preference(labels="agreement", beta=1.0)
    assert not algorithm.needs().rewards and not algorithm.needs().pairs
    asked = replace(group("p", (1, 1, 2, 1), (0.0,) * 4), scores=None)
    passes = {"own_policy": [[3.0], [1.0], [3.0, 1.0], [0.0]], "own_reference": [[2.0], [3.0], [0.0, 2.0], [0.0]]}
    advantages = algorithm.advantages(step([asked], passes))
    assert advantages.pairs is not None and advantages.pairs.tolist() == [[0, 3]]
    assert advantages.pair_values["probability"] == pytest.approx([2 / 3])
    assert advantages.metrics["preference/agreement"] == pytest.approx(2 / 3)
    assert advantages.keep.tolist() == [True, False, False, True]


def test_dno_takes_the_reward_s_win_probability() -> None:
    advantages = preference(labels="gain", pairs="all").advantages(step([group("p", (1, 1), (0.3, 0.8))]))
    assert advantages.pairs is not None and advantages.pairs.tolist() == [[1, 0]]
    assert advantages.pair_values["probability"] == pytest.approx([1 / (1 + math.exp(-0.5))])


def test_mm_dpo_s_beta_follows_the_gain() -> None:
    groups = [group("p", (1, 1), (2.0, 1.0)), group("q", (1, 1), (1.0, 0.0), [PreferencePair(0, 1, margin=2.0)])]
    values = preference(dynamic_beta=0.5).advantages(step(groups)).pair_values
    assert values["beta"] == pytest.approx([0.119673, 0.131606], abs=1e-6)
    assert "margin" not in values


def test_rdp_and_copg_read_rewards() -> None:
    experience, policy = step([group("p", (1, 1), (1.0, 0.2))]), torch.tensor([0.3, -0.1])
    assert loss_of(preference(link="rdp", beta=1.0), experience, policy, torch.zeros(2)).loss.item() == pytest.approx(
        0.16
    )
    clipped = preference(link="rdp", beta=1.0, clip=0.1)
    old = torch.tensor([0.1, -0.05])
    assert loss_of(clipped, experience, policy, torch.zeros(2), old=old).loss.item() == pytest.approx(0.25)
    copg = preference(link="copg", beta=0.5)
    assert loss_of(copg, experience, policy, torch.zeros(2)).loss.item() == pytest.approx(-0.28)
    assert not copg.normalises() and preference().normalises()
    tied = preference(link="copg", pairs="all").advantages(step([group("p", (1,) * 3, (1.0, 0.0, 1.0))]))
    assert tied.pairs is not None and tied.pairs.tolist() == [[0, 1], [0, 2], [2, 1]]
    assert tied.pair_values["gain"].tolist() == [1.0, 0.0, 1.0]


def test_pacs_needs_whole_groups_and_looks_at_the_policy_before_the_step() -> None:
    algorithm = preference(link="pacs", reference="old", beta=1.0)
    assert algorithm.needs().layout == "full_group" and not algorithm.needs().reference_policy
    experience = step([group("p", (1,) * 4, (1.0, 0.0, 0.0, 0.0))])
    policy = torch.tensor([0.4, -0.2, 0.1, -0.3])
    losses = [
        loss_of(one, experience, policy, policy, old=torch.zeros(4)).loss.item()
        for one in (algorithm, preference(link="pacs", reference="old", beta=1.0, balance_classes=True))
    ]
    assert losses == pytest.approx([0.576337, 0.538099], abs=1e-6)
    lonely = algorithm.advantages(step([group("p", (1, 1), (1.0, None)), group("q", (1, 1), (1.0, 0.0))]))
    assert lonely.keep.tolist() == [False, False, True, True]


def test_kto_s_baseline_is_of_the_whole_step() -> None:
    algorithm = preference(link="kto", beta=0.3)
    groups = [group("p", (2, 1), (1.0, 0.0)), group("q", (1,), (0.0,)), group("p", (3,), (1.0,))]
    other = algorithm.groups_for("mismatched_policy", groups, lambda messages: ())
    assert [(g.id, g.prompt.id, len(g.samples), len(g.samples[0])) for g in other] == [
        ("p", "q", 1, 3),
        ("q", "p", 1, 1),
    ]
    passes = {
        "mismatched_policy": [[0.2, 0.1, 0.3], [0.4]],
        "mismatched_reference": [[0.1, 0.0, 0.0], [0.2]],
    }
    advantages = algorithm.advantages(step(groups, passes))
    assert advantages.scalars["baseline"] == pytest.approx((0.5 + 0.2) / 2)
    low = {"mismatched_policy": passes["mismatched_reference"], "mismatched_reference": passes["mismatched_policy"]}
    assert algorithm.advantages(step(groups, low)).scalars["baseline"] == 0.0
    with pytest.raises(UserError, match="prompts_per_step=2"):
        mismatched([groups[0], groups[2]])


def test_a_cached_reference_is_held_for_other_prompts_alone() -> None:
    links = ("sigmoid", "bco", "kto")
    held = {link: preference(link=link).needs().frozen_models(references_cached=True) for link in links}
    assert held == {"sigmoid": set(), "bco": set(), "kto": {"reference"}}
    assert preference(link="bco").needs().frozen_models(references_cached=False) == {"reference"}


def test_bco_s_shift_is_halfway_between_good_and_bad() -> None:
    groups = [group("p", (2, 1), (1.0, 0.0)), group("q", (1,), (0.0,))]
    passes = {"own_policy": [[1.0, 1.0], [0.5], [0.1]], "own_reference": [[0.5, 0.5], [0.5], [0.5]]}
    advantages = preference(link="bco").advantages(step(groups, passes))
    assert advantages.scalars["shift"] == pytest.approx((1.0 - 0.2) / 2)


@pytest.mark.parametrize("link", ["kto", "bco"])
def test_baselines_are_means_over_tokens_where_scores_are(link: str) -> None:
    groups = [group("p", (2, 2), (1.0, 0.0)), group("q", (2,), (0.0,))]
    names = ("mismatched_policy", "mismatched_reference") if link == "kto" else ("own_policy", "own_reference")
    rows = 2 if link == "kto" else 3
    passes = {names[0]: [[0.4, 0.2]] * rows, names[1]: [[0.0, 0.0]] * rows}
    sums, means = (
        preference(link=link, length_normalised=normalised).advantages(step(groups, passes)).scalars
        for normalised in (False, True)
    )
    name = "baseline" if link == "kto" else "shift"
    assert sums[name] == pytest.approx(0.6) and means[name] == pytest.approx(0.3)


def test_weights_of_responses_count() -> None:
    def weighted(values: Sequence[float], weights: Sequence[float]) -> Group:
        plain = group("p", (1,) * len(values), values)
        samples = (replace(s, weight=w) for s, w in zip(plain.samples, weights, strict=True))
        return replace(plain, samples=tuple(samples))

    labelled = preference(link="bco", beta=1.0)
    passes = {name: [[0.0]] * 2 for name in ("own_policy", "own_reference")}
    losses = [
        loss_of(labelled, step([weighted((1.0, 0.0), weights)], passes), torch.tensor([0.3, -0.2]), torch.zeros(2)).loss
        for weights in ((1.0, 1.0), (3.0, 0.0))
    ]
    good, bad = math.log1p(math.exp(-0.3)), math.log1p(math.exp(-0.2))
    assert [loss.item() for loss in losses] == pytest.approx([(good + bad) / 2, 3 * good / 2])
    compared = preference(pairs="all").advantages(step([weighted((2.0, 1.0, 0.0), (1.0, 0.5, 0.0))]))
    assert compared.pair_values["weight"].tolist() == [0.75, 0.5, 0.25]


def test_a_margin_of_0_is_no_missing_margin() -> None:
    pairs = [group("p", (1, 1), (1.0, 0.0), [PreferencePair(0, 1, margin=m)]) for m in (0.0, None, 0.4)]
    gains = preference(link="rdp").advantages(step(pairs)).pair_values["gain"]
    assert gains.tolist() == pytest.approx([0.0, 1.0, 0.4])


def test_wpo_weighs_pairs_by_how_likely_they_are() -> None:
    experience = step([group("p", (2, 1), (1.0, 0.0)), group("q", (1, 1), (1.0, 0.0))])
    policy, reference = torch.tensor([-0.2, -0.4, -0.1, -2.0, -1.0]), torch.zeros(5)
    output = loss_of(preference(beta=1.0, on_policy_weights=True), experience, policy, reference)
    losses = [math.log1p(math.exp(0.6 - 0.1)), math.log1p(math.exp(2.0 - 1.0))]
    expected = (math.exp(-0.3 - 0.1) * losses[0] + math.exp(-2.0 - 1.0) * losses[1]) / 2
    assert output.loss.item() == pytest.approx(expected, abs=1e-6)
