"""What every algorithm must keep to. Run it against your own:

    ALGORITHM=my_module.MyAlgorithm ALGORITHM_OPTIONS='{"my_key": 3}' python -m pytest tests/contract

A surrogate loss of your own is tested with an algorithm that uses it:

    ALGORITHM=algorithms.grpo.GRPO ALGORITHM_OPTIONS='{"loss": "my_losses.soft"}' python -m pytest tests/contract

Without the variable it checks all that are built in.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from contract_step import gradients, loss_inputs, make_experience, per_sample, with_models

from algorithms.base import Algorithm, AlgorithmConfig, Denominators, ValueLossInputs
from rlkit.config.parts import import_part
from rlkit.experience import Group, GroupScores, Score, UserError

BUILT_IN: list[tuple[str, dict[str, Any]]] = [
    ("algorithms.grpo.GRPO", {}),
    ("algorithms.grpo.GRPO", {"kl_in": "reward", "kl_target": 0.1}),
    ("algorithms.grpo.GRPO", {"loss": "gspo", "kl_coefficient": 0.0}),
    ("algorithms.grpo.GRPO", {"loss": "cispo", "clip_low": 1.0, "rollout_correction": "truncate", "largest_weight": 2}),
    ("algorithms.grpo.GRPO", {"estimator": "opo", "kl_coefficient": 0.0}),
    ("algorithms.grpo.GRPO", {"estimator": "gpg", "loss": "policy_gradient", "kl_coefficient": 0.0}),
    ("algorithms.grpo.GRPO", {"estimator": "maxrl", "kl_coefficient": 0.0}),
    ("algorithms.grpo.GRPO", {"estimator": "passk", "k": 2, "kl_coefficient": 0.0}),
    ("algorithms.grpo.GRPO", {"loss": "sapo", "rollout_correction": "sequence_truncate", "largest_weight": 2}),
    ("algorithms.grpo.GRPO", {"loss": "gmpo", "rollout_correction": "geometric_mask", "largest_weight": 1.1}),
    ("algorithms.grpo.GRPO", {"loss": "dppo", "kl_coefficient": 0.0}),
    ("algorithms.grpo.GRPO", {"loss": "clip_cov", "loss_options": {"share": 0.1, "low": 0}, "kl_coefficient": 0.0}),
    ("algorithms.grpo.GRPO", {"loss": "kl_cov", "loss_options": {"share": 0.1}, "kl_coefficient": 0.0}),
    ("algorithms.gdpo.GDPO", {"components": {"good": 1.0, "short": 0.5}}),
    ("algorithms.rloo.RLOO", {}),
    ("algorithms.reinforce_pp.ReinforcePP", {}),
    ("algorithms.remax.ReMax", {}),
    ("algorithms.ppo.PPO", {}),
    ("algorithms.ppo.PPO", {"credit": "turns", "gae_lambda": 0.9}),
    ("algorithms.prime.PRIME", {}),
    ("algorithms.step_credit.StepCredit", {}),
    ("algorithms.step_credit.StepCredit", {"credit": "loo"}),
    ("algorithms.step_credit.StepCredit", {"credit": "loo", "gamma": 0.9}),
    ("algorithms.step_credit.StepCredit", {"credit": "anchor_states", "gamma": 0.9, "normalize_by_std": True}),
    ("algorithms.step_credit.StepCredit", {"credit": "episode_plus_step"}),
    ("algorithms.step_credit.StepCredit", {"credit": "turn_discounted", "gamma": 0.9}),
    ("algorithms.step_credit.StepCredit", {"credit": "turn_discounted", "norm": "position_mean"}),
    ("algorithms.brpo.BRPO", {}),
    ("algorithms.preference.Preference", {}),
    ("algorithms.preference.Preference", {"pairs": "all", "labels": "gain", "nll_coefficient": 0.5, "ld_alpha": 0.5}),
    ("algorithms.preference.Preference", {"labels": "agreement"}),
    ("algorithms.preference.Preference", {"guide": "/models/guide", "token_reward_coefficient": 0.25}),
    ("algorithms.preference.Preference", {"link": "rdp", "pairs": "adjacent", "clip": 0.1}),
    ("algorithms.preference.Preference", {"link": "kto"}),
    ("algorithms.preference.Preference", {"link": "bco"}),
    ("algorithms.preference.Preference", {"link": "pacs", "reference": "old", "balance_classes": True}),
]
TARGET = os.environ.get("ALGORITHM")
CASES = [(TARGET, json.loads(os.environ.get("ALGORITHM_OPTIONS", "{}")))] if TARGET else BUILT_IN


@pytest.fixture(params=CASES, ids=lambda case: " ".join([case[0].rpartition(".")[2], *map(str, case[1].values())]))
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    parameters: tuple[str, dict[str, Any]] = request.param
    return parameters


@pytest.fixture
def algorithm(case: tuple[str, dict[str, Any]]) -> Algorithm:
    return make(case)


def make(case: tuple[str, dict[str, Any]]) -> Algorithm:
    target, options = case
    kind = import_part("algorithm", target)
    algorithm: Algorithm = kind(kind.Config(**options))
    return algorithm


# -- configuration -----------------------------------------------------------------------------------------


def test_its_options_are_typed_and_documented(case: tuple[str, dict[str, Any]]) -> None:
    target, options = case
    config = import_part("algorithm", target).Config
    assert issubclass(config, AlgorithmConfig)
    undocumented = [name for name, field in config.model_fields.items() if not field.description]
    assert undocumented == [], "write what each option means under it, as a string"
    with pytest.raises(ValueError, match="no_such_option"):
        config(**options, no_such_option=1)


def test_importing_it_is_cheap(case: tuple[str, dict[str, Any]]) -> None:
    """The configuration layer imports it; torch belongs into the functions that compute a loss."""
    target, options = case
    module, _, name = target.rpartition(".")
    script = (
        f"import sys, {module}; {module}.{name}.Config(**{options!r}); "
        "print([m for m in ('torch', 'transformers', 'vllm', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]", "import these inside the functions that use them"


def test_a_kl_penalty_gets_its_reference(case: tuple[str, dict[str, Any]]) -> None:
    target, options = case
    if "kl_coefficient" not in import_part("algorithm", target).Config.model_fields:
        pytest.skip("it has no KL penalty")
    needs = make((target, {**options, "kl_coefficient": 0.1})).needs()
    assert needs.reference_policy, "needs() drops what super().needs() asks for"


def test_it_travels_to_the_learner(algorithm: Algorithm) -> None:
    kind, config = pickle.loads(pickle.dumps((type(algorithm), algorithm.config)))
    assert kind(config).needs() == algorithm.needs()
    assert algorithm.config.samples_per_prompt >= 1


# -- advantages ----------------------------------------------------------------------------------------------


def test_one_finite_number_for_every_token(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    advantages = algorithm.advantages(experience)
    samples = [sample for group in experience.groups for sample in group.samples]
    for rows in filter(None, [advantages.tokens, advantages.returns, *advantages.extras.values()]):
        assert [len(row) for row in rows] == [len(sample) for sample in samples]
        assert all(np.isfinite(row).all() for row in rows)
    assert all(row.dtype == np.float32 for row in advantages.tokens)
    assert advantages.keep.shape == (len(samples),) and advantages.keep.dtype == np.bool_
    assert advantages.keep.any(), "it learns from none of these groups"
    assert all(np.isfinite(value) for value in (*advantages.metrics.values(), *advantages.scalars.values()))
    assert (advantages.returns is not None) == algorithm.needs().critic


def test_advantages_of_another_length_are_refused(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    advantages = algorithm.advantages(experience)
    advantages.check(experience, algorithm)
    short = replace(advantages, tokens=[row[:-1] for row in advantages.tokens])
    with pytest.raises(UserError, match=r"advantages: sample 0 has \d+ response tokens"):
        short.check(experience, algorithm)


def test_tokens_that_are_not_trained_get_nothing(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    samples = [sample for group in experience.groups for sample in group.samples]
    for sample, row in zip(samples, algorithm.advantages(experience).tokens, strict=True):
        assert (row[~sample.trained] == 0).all()


def test_invalid_samples_are_left_out_and_change_nobody(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    with_them = algorithm.advantages(experience)
    keep, tokens = per_sample(experience, with_them.keep), per_sample(experience, with_them.tokens)
    for group in experience.groups:
        assert not keep[group.id, 1], "the second sample has no valid score"
        assert not keep[group.id, 3], "the fourth sample has no trained token"
    without = with_models([without_samples(group, {1, 3}) for group in experience.groups], algorithm)
    alone = algorithm.advantages(without)
    for name, row in per_sample(without, alone.tokens).items():
        np.testing.assert_allclose(row, tokens[name], atol=1e-6)
    for name, kept in per_sample(without, alone.keep).items():
        assert kept == keep[name]


def without_samples(group: Group, indices: set[int]) -> Group:
    assert group.scores is not None
    chosen = [i for i in range(len(group.samples)) if i not in indices]
    scores = replace(group.scores, samples=tuple(group.scores.samples[i] for i in chosen))
    return replace(group, samples=tuple(group.samples[i] for i in chosen), scores=scores)


def test_advantages_change_nothing(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    before = pickle.dumps((experience, algorithm.state_dict()))
    first, second = algorithm.advantages(experience), algorithm.advantages(experience)
    assert pickle.dumps((experience, algorithm.state_dict())) == before
    for a, b in zip(first.tokens, second.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.keep == second.keep).all() and first.metrics == second.metrics


def test_the_order_of_groups_and_samples_does_not_matter(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    expected = algorithm.advantages(experience)
    rng = np.random.default_rng(1)
    groups = []
    for g in rng.permutation(len(experience.groups)):
        group = experience.groups[g]
        assert group.scores is not None
        order = rng.permutation(len(group.samples))
        scores = replace(group.scores, samples=tuple(group.scores.samples[i] for i in order))
        groups.append(replace(group, samples=tuple(group.samples[i] for i in order), scores=scores))
    shuffled = with_models(groups, algorithm)
    other = algorithm.advantages(shuffled)
    tokens, keep = per_sample(experience, expected.tokens), per_sample(experience, expected.keep)
    for name, row in per_sample(shuffled, other.tokens).items():
        np.testing.assert_allclose(row, tokens[name], atol=1e-6)
    for name, kept in per_sample(shuffled, other.keep).items():
        assert kept == keep[name]


def test_groups_where_nothing_is_valid_are_no_error(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    broken = [
        replace(group, scores=GroupScores(tuple(Score.invalid("timeout: test") for _ in group.samples)))
        for group in experience.groups
    ]
    advantages = algorithm.advantages(replace(experience, groups=broken))
    assert not advantages.keep.any()
    assert all(np.isfinite(row).all() for row in advantages.tokens)


# -- losses --------------------------------------------------------------------------------------------------


def test_the_loss_is_finite_and_has_gradients_on_trained_tokens_only(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    inputs = loss_inputs(algorithm, experience, algorithm.advantages(experience), range(24))
    loss, sums, gradient = gradients(algorithm, inputs)
    assert np.isfinite(loss) and np.isfinite(gradient).all() and all(np.isfinite(value) for value in sums.values())
    assert (gradient != 0).any(), "nothing would be learnt"
    assert (gradient[inputs.mask.numpy() == 0] == 0).all()


@pytest.mark.parametrize("parts", [2, 3, 24])
def test_micro_batches_in_any_order_add_up(algorithm: Algorithm, parts: int) -> None:
    """Losses divide by the totals of the whole step, so its split does not matter."""
    experience = make_experience(algorithm)
    advantages = algorithm.advantages(experience)
    layout = algorithm.needs().layout
    whole_inputs = loss_inputs(algorithm, experience, advantages, range(24))
    whole, sums, gradient = gradients(algorithm, whole_inputs)
    unit = {"any": 1, "pairs": 6, "full_group": 6}[layout]
    blocks = np.random.default_rng(2).permutation(24 // unit)
    total, totals = 0.0, dict.fromkeys(sums, 0.0)
    by_sample: dict[int, np.ndarray] = {}
    samples = [sample for group in experience.groups for sample in group.samples]
    kept = {i for i, sample in enumerate(samples) if advantages.keep[i] and sample.trained.any()}
    for part in np.array_split(blocks, min(parts, len(blocks))):
        order = [int(block) * unit + i for block in part for i in range(unit)]
        chosen = [i for i in order if i in kept]
        if not chosen:
            continue
        loss, of_part, rows = gradients(algorithm, loss_inputs(algorithm, experience, advantages, order))
        total += loss
        totals = {name: totals[name] + of_part[name] for name in totals}
        by_sample |= dict(zip(chosen, np.split(rows, np.cumsum([len(samples[i]) for i in chosen])[:-1]), strict=True))
    assert total == pytest.approx(whole, abs=1e-9)
    assert totals == pytest.approx(sums, abs=1e-9)
    np.testing.assert_allclose(np.concatenate([by_sample[i] for i in sorted(by_sample)]), gradient, atol=1e-9)


def test_what_is_not_trained_does_not_enter_the_loss(algorithm: Algorithm) -> None:
    """Neither log-probs nor advantages of tokens that somebody else wrote."""
    experience = make_experience(algorithm)
    inputs = loss_inputs(algorithm, experience, algorithm.advantages(experience), range(24))
    expected, _, _ = gradients(algorithm, inputs)
    noise = torch.where(inputs.mask > 0, 0.0, 3.0).to(torch.float64)
    other = replace(
        inputs,
        logprobs=(inputs.logprobs.detach() + noise).requires_grad_(),
        rollout_logprobs=inputs.rollout_logprobs - noise,
        advantages=inputs.advantages + noise,
    )
    assert gradients(algorithm, other)[0] == pytest.approx(expected, abs=1e-9)


def test_the_loss_is_pure(algorithm: Algorithm) -> None:
    experience = make_experience(algorithm)
    advantages = algorithm.advantages(experience)
    before = algorithm.state_dict()
    results = [gradients(algorithm, loss_inputs(algorithm, experience, advantages, range(24))) for _ in range(2)]
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][2], results[1][2])
    assert algorithm.state_dict() == before


def test_a_critic_has_a_loss(algorithm: Algorithm) -> None:
    if not algorithm.needs().critic:
        pytest.skip("it needs no critic")
    values = torch.tensor([0.1, 0.9, -0.4], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    output = algorithm.value_loss(
        ValueLossInputs(
            values=values,
            old_values=values.detach() * 0.9,
            returns=torch.tensor([1.0, 0.0, 5.0], dtype=torch.float64),
            mask=mask,
            sequence=torch.zeros(3, dtype=torch.int64),
            num_sequences=1,
            denominators=Denominators(2.0, 1.0, 1.0),
        )
    )
    output.loss.backward()
    assert output.loss.isfinite() and values.grad is not None
    assert values.grad[0] != 0 and values.grad[2] == 0


# -- state ---------------------------------------------------------------------------------------------------


def test_its_state_survives_a_checkpoint(case: tuple[str, dict[str, Any]]) -> None:
    algorithm, other = make(case), make(case)
    algorithm.observe({"kl/reference": 3.0, "policy/trained_samples": 64.0, "policy/loss": 0.1, "policy/entropy": 1.0})
    state = json.loads(json.dumps(algorithm.state_dict()))  # checkpoints are JSON
    other.load_state_dict(state)
    assert other.state_dict() == algorithm.state_dict()
    experience = make_experience(algorithm)
    first, second = algorithm.advantages(experience), other.advantages(experience)
    assert first.scalars == second.scalars
    for a, b in zip(first.tokens, second.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
