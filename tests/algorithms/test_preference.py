"""Preference optimisation: TRL's losses and gradients, what is compared, refusals, the first loss, held-out pairs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from algorithms.base import Advantages, Denominators, Experience, LossInputs, LossOutput
from algorithms.functional.prompts import mismatched
from algorithms.preference import Preference
from rlkit.experience import Group, GroupScores, Message, PreferencePair, Prompt, Sample, Score, UserError

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECIPES = Path(__file__).parent.parent.parent / "conf" / "algorithm"
TRL: dict[str, Any] = json.loads((FIXTURES / "trl_links.json").read_text())
PAIRS = len(TRL["policy"]) // 2

Rows = Sequence[Sequence[float]]


def preference(**options: Any) -> Preference:
    return Preference(Preference.Config(**options))


def group(
    name: str,
    lengths: Sequence[int],
    values: Sequence[float | None],
    pairs: Sequence[PreferencePair] = (),
    masks: Mapping[int, Sequence[bool]] | None = None,
) -> Group:
    samples = [
        Sample(
            index=i,
            token_ids=np.full(length, 5, np.int32),
            logprobs=None,
            text="",
            finish_reason="stop",
            policy_versions=(0, 0),
            seed=i,
            mask=None if masks is None or i not in masks else np.array(masks[i]),
        )
        for i, length in enumerate(lengths)
    ]
    scores = [Score.invalid("timeout: test") if value is None else Score(value) for value in values]
    prompt = Prompt(name, (Message("user", name),), tuple(map(ord, name)))
    return Group(name, prompt, tuple(samples)).with_scores(GroupScores(tuple(scores), tuple(pairs)))


def step(groups: Sequence[Group], logprobs: Mapping[str, Rows] | None = None, number: int = 2) -> Experience:
    passes = {name: [np.array(row, np.float32) for row in rows] for name, rows in (logprobs or {}).items()}
    return Experience(groups, number, logprobs=passes)


def loss_of(
    algorithm: Preference,
    experience: Experience,
    policy: torch.Tensor,
    reference: torch.Tensor,
    advantages: Advantages | None = None,
    old: torch.Tensor | None = None,
) -> LossOutput:
    """All samples in one micro-batch; policy and reference [R]."""
    advantages = advantages or algorithm.advantages(experience)
    samples = [sample for g in experience.groups for sample in g.samples]
    assert advantages.keep.all()
    pairs = np.zeros((0, 2), np.int64) if advantages.pairs is None else advantages.pairs
    lengths = torch.tensor([len(sample) for sample in samples])
    mask = torch.tensor(np.concatenate([sample.trained for sample in samples])).float()
    return algorithm.loss(
        LossInputs(
            logprobs=policy,
            entropy=torch.zeros_like(policy),
            old_logprobs=policy.detach() if old is None else old,
            rollout_logprobs=policy.detach(),
            advantages=torch.zeros_like(policy),
            mask=mask,
            sequence=torch.repeat_interleave(torch.arange(len(samples)), lengths),
            group=torch.repeat_interleave(
                torch.arange(len(experience.groups)), torch.tensor([len(g.samples) for g in experience.groups])
            ),
            denominators=Denominators(float(mask.sum()), len(samples), len(experience.groups), len(pairs)),
            reference_logprobs=reference if algorithm.needs().reference_policy else None,
            extras={name: torch.from_numpy(np.concatenate(rows)) for name, rows in advantages.extras.items()},
            scalars=advantages.scalars,
            samples={name: torch.from_numpy(values) for name, values in advantages.samples.items()},
            pairs=torch.from_numpy(pairs),
            pair_values={name: torch.from_numpy(values) for name, values in advantages.pair_values.items()},
        )
    )


# -- TRL -------------------------------------------------------------------------------------------------------------

ORDER = [i for p in range(PAIRS) for i in (p, p + PAIRS)]
"""The fixture has chosen responses first; here a pair is a group."""


def flat(rows: Rows) -> torch.Tensor:
    return torch.tensor([value for i in ORDER for value in rows[i]], dtype=torch.float32)


def recorded_pairs() -> list[Group]:
    lengths = [(len(TRL["policy"][p]), len(TRL["policy"][p + PAIRS])) for p in range(PAIRS)]
    return [group(f"p{p}", pair, (1.0, 0.0), [PreferencePair(0, 1)]) for p, pair in enumerate(lengths)]


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


# -- what is compared --------------------------------------------------------------------------------------------------


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
        ({"ld_alpha": 0.5, "length_normalised": True}, "ld_alpha weighs sums"),
        ({"guide": "x", "reference": "none"}, "guide weighs sums"),
        ({"guide_weight": 1.0}, "guide_weight has no effect with guide=null"),
        ({"dynamic_beta_rate": 1.0}, "dynamic_beta_rate has no effect with dynamic_beta=0"),
        ({"token_reward_coefficient": 0.1, "reference": "none"}, "token_reward_coefficient has no effect"),
        ({"worse_prompt": "?"}, "worse_prompt has no effect"),
        ({"labels": "agreement", "pairs": "all"}, "pairs has no effect with labels=agreement"),
        ({"reference": "none", "reference_every_steps": 5}, "reference_every_steps has no effect"),
        ({"link": "sigmod"}, "did you mean sigmoid"),
        ({"link": "json.dumps"}, "takes neither chosen and rejected nor scores"),
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
    assert "the first loss is 0.7200 where" in caplog.text and "gives 0.6931" in caplog.text


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
