"""The policy learner on one rank: what must not change an update, what must, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import (
    build_learner,
    grpo_advantages,
    make_groups,
    smooth_steps,
    torch_optimizer,
    weights_of,
    write_tiny_model,
)
from transformers import AutoModelForCausalLM

from algorithms.base import LossInputs, LossOutput
from algorithms.grpo import GRPO
from rlkit.config.schema import LearnerConfig
from rlkit.experience import Group
from rlkit.learner.engine import learning_rate
from rlkit.learner.policy import PolicyLearner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    """Ragged; one sample is invalid, one is partly masked, one is masked whole."""
    groups = make_groups(count=4, seed=3)
    first, second, *others = groups[2].samples
    partly = np.arange(len(first)) % 3 != 1
    masked = (replace(first, mask=partly), replace(second, mask=np.zeros(len(second), dtype=np.bool_)), *others)
    groups[2] = replace(groups[2], samples=masked)
    return groups


# -- what must not change an update ------------------------------------------------------------------------------------

Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def two_updates(model: Path, groups: list[Group], **options: Any) -> Outcome:
    """Metrics of both updates and the weights after them. (The second has a KL to the reference.)"""
    learner = smooth_steps(build_learner(model, learning_rate=0.1, **options))
    metrics = [learner.update(groups, grpo_advantages(groups)) for _ in range(2)]
    return metrics, weights_of(learner)


@pytest.fixture(scope="module")
def baseline(model: Path, groups: list[Group]) -> Outcome:
    return two_updates(model, groups)


def reversed_samples(groups: list[Group]) -> list[Group]:
    turned = []
    for group in groups:
        assert group.scores is not None
        scores = replace(group.scores, samples=group.scores.samples[::-1])
        turned.append(replace(group, samples=group.samples[::-1], scores=scores))
    return turned


def unchanged(groups: list[Group]) -> list[Group]:
    return groups


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"tokens_per_microbatch": 60}, unchanged),
        ({"tokens_per_microbatch": 20}, unchanged),  # smaller than a group: its samples are spread
        ({"tokens_per_microbatch": 1}, unchanged),
        ({"logit_elements_per_chunk": 130}, unchanged),
        ({"gradient_checkpointing": True, "tokens_per_microbatch": 60}, unchanged),
        ({}, lambda groups: groups[::-1]),
        ({"tokens_per_microbatch": 40}, reversed_samples),
        ({"zero_stage": 1}, unchanged),
        ({"zero_stage": 1, "tokens_per_microbatch": 30}, unchanged),
        ({"zero_stage": 2}, unchanged),
        ({"zero_stage": 2, "tokens_per_microbatch": 30}, unchanged),
        ({"zero_stage": 3, "tokens_per_microbatch": 30}, unchanged),
    ],
)
def test_an_update_does_not_depend_on(
    model: Path,
    groups: list[Group],
    baseline: Outcome,
    options: dict[str, Any],
    change: Callable[[list[Group]], list[Group]],
) -> None:
    wanted, wanted_weights = baseline
    got, weights = two_updates(model, change(groups), **options)
    for want, have in zip(wanted, got, strict=True):
        assert want.keys() == have.keys()
        for name, value in want.items():
            assert have[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    assert wanted[0]["policy/grad_norm"] > 0.1
    assert wanted[1]["kl/reference"] > 1e-4
    start = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    for name, weight in wanted_weights.items():
        moved = float((weight - start[name].detach()).abs().max())
        torch.testing.assert_close(weights[name], weight, atol=moved * 1e-3, rtol=0)
        assert moved > 1e-4


def test_loss_of_the_first_update_is_the_mean_advantage(groups: list[Group], baseline: Outcome) -> None:
    """Ratios are 1 there, so eq. 3's value is minus the samples' mean advantage, over trained tokens only."""
    advantages = grpo_advantages(groups)
    samples = [sample for group in groups for sample in group.samples]
    kept = [i for i, sample in enumerate(samples) if advantages.keep[i] and sample.trained.any()]
    mean = np.mean([advantages.tokens[i][samples[i].trained].mean() for i in kept])
    metrics = baseline[0][0]
    assert metrics["policy/loss"] == pytest.approx(-mean, abs=1e-6)
    assert metrics["policy/trained_samples"] == len(kept) == len(samples) - 2
    assert metrics["policy/optimizer_steps"] == 1


def test_token_mean_divides_by_trained_tokens(model: Path, groups: list[Group]) -> None:
    algorithm = GRPO(GRPO.Config(samples_per_prompt=4, aggregation="token_mean"))
    metrics = build_learner(model, algorithm=algorithm, tokens_per_microbatch=40).update(
        groups, grpo_advantages(groups)
    )
    advantages = grpo_advantages(groups)
    samples = [sample for group in groups for sample in group.samples]
    tokens = [advantages.tokens[i][s.trained] for i, s in enumerate(samples) if advantages.keep[i]]
    assert metrics["policy/loss"] == pytest.approx(-np.concatenate(tokens).mean(), abs=1e-6)


def test_masked_tokens_reach_neither_loss_nor_metrics(model: Path, groups: list[Group], baseline: Outcome) -> None:
    advantages, rng = grpo_advantages(groups), np.random.default_rng(0)
    wild, tokens = [], list(advantages.tokens)
    place = 0
    for group in groups:
        samples = []
        for sample in group.samples:
            hidden = ~sample.trained
            tokens[place] = np.where(hidden, 1e3, tokens[place]).astype(np.float32)
            logprobs = np.where(hidden, rng.uniform(-50, 0, len(sample)), sample.logprobs).astype(np.float32)
            samples.append(replace(sample, logprobs=logprobs))
            place += 1
        wild.append(replace(group, samples=tuple(samples)))
    learner = smooth_steps(build_learner(model, learning_rate=0.1))
    metrics = learner.update(wild, replace(advantages, tokens=tokens))
    assert metrics == pytest.approx(baseline[0][0], rel=1e-6, abs=1e-9)


# -- log-probs and weights ---------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_logprobs(folder: Path, groups: list[Group], temperature: float) -> list[np.ndarray]:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([*group.prompt.token_ids, *sample.token_ids.tolist()])
            logp = torch.log_softmax(plain(ids[None]).logits[0] / temperature, dim=-1)
            start = len(group.prompt.token_ids)
            found.append(logp[start - 1 : -1].gather(1, ids[start:, None])[:, 0].numpy())
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_saved_policy_is_the_one_that_was_trained(
    model: Path, groups: list[Group], tmp_path: Path, temperature: float
) -> None:
    learner = build_learner(model, learning_rate=0.01, zero_stage=1, tokens_per_microbatch=50, temperature=temperature)
    before = learner.group_logprobs(groups)
    for ours, plain in zip(before, plain_logprobs(model, groups, temperature), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)
    learner.update(groups, grpo_advantages(groups))
    learner.save(tmp_path / "policy")
    after = learner.group_logprobs(groups)  # after the save: saving in mid-run must leave the learner as it was
    for ours, plain in zip(after, plain_logprobs(tmp_path / "policy", groups, temperature), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 0.01
    reference = learner.group_logprobs(groups, "reference")
    for ours, start in zip(reference, before, strict=True):
        np.testing.assert_allclose(ours, start, atol=1e-6)

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert saved.get_output_embeddings().weight.data_ptr() == saved.get_input_embeddings().weight.data_ptr()
    assert type(saved.get_output_embeddings()) is torch.nn.Linear
    canary = [3, 4, 5, 6]
    logp = torch.log_softmax(saved(torch.tensor([canary])).logits[0], dim=-1)
    wanted = [logp[i, token].item() for i, token in enumerate(canary[1:])]
    np.testing.assert_allclose(learner.canary_logprobs([canary]), wanted, atol=1e-5)


def test_named_weights_carry_hugging_face_names_and_ties_once(model: Path) -> None:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for stage in (0, 3):
        published = weights_of(build_learner(model, zero_stage=stage))
        assert published.keys() == stored.keys()
        assert all(torch.equal(published[name], stored[name]) for name in stored)


# -- several optimizer steps -------------------------------------------------------------------------------------------


class Recording(GRPO):
    """GRPO that remembers what its loss was given."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[LossInputs] = []

    def loss(self, inputs: LossInputs) -> LossOutput:
        self.seen.append(inputs)
        return super().loss(inputs)


def test_minibatches_compare_with_the_policy_before_the_whole_update(model: Path, groups: list[Group]) -> None:
    algorithm = Recording(GRPO.Config(samples_per_prompt=4))
    learner = build_learner(model, algorithm=algorithm, learning_rate=0.01, minibatches_per_step=2)
    advantages = grpo_advantages(groups)
    everything = learner.group_logprobs(groups)
    kept = [
        sample.trained.any() and advantages.keep[i]
        for i, sample in enumerate(s for group in groups for s in group.samples)
    ]
    metrics = learner.update(groups, advantages)
    first, second = algorithm.seen
    half = sum(len(group.samples) for group in groups[:2])
    for seen, own in ((first, slice(None, half)), (second, slice(half, None))):
        old = np.concatenate([logprobs for logprobs, k in zip(everything[own], kept[own], strict=True) if k])
        # micro-batches order the groups by size
        np.testing.assert_allclose(np.sort(seen.old_logprobs), np.sort(old), atol=1e-5)
    assert (second.logprobs - second.old_logprobs).abs().max() > 1e-3, "the first step changed nothing"
    np.testing.assert_allclose(first.logprobs.detach(), first.old_logprobs, atol=1e-5)
    assert learner.optimizer_steps == metrics["policy/optimizer_steps"] == 2
    assert learner.version == 1
    assert second.denominators.groups == 2


def test_learning_rate_warms_up_and_decays_to_its_minimum(model: Path, groups: list[Group]) -> None:
    def rates(steps: int, **options: Any) -> list[float]:
        config = LearnerConfig(learning_rate=1.0, **options)
        return [learning_rate(config, step, steps) for step in range(steps)]

    assert rates(3) == [1, 1, 1]
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(5, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates(5, schedule="linear", min_learning_rate_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3, 0])
    assert rates(3, schedule="cosine", min_learning_rate_ratio=0.1) == pytest.approx([1, 0.55, 0.1])
    assert rates(1, schedule="cosine") == [1]
    past = LearnerConfig(learning_rate=1.0, schedule="cosine")
    assert learning_rate(past, 99, 5) == pytest.approx(0)

    learner = build_learner(model, learning_rate=1e-3, schedule="linear", warmup_steps=2, zero_stage=1)
    seen = [learner.update(groups, grpo_advantages(groups))["policy/learning_rate"] for _ in range(3)]
    assert seen == pytest.approx([5e-4, 1e-3, 1e-3])
    assert [group["lr"] for group in torch_optimizer(learner).param_groups] == pytest.approx([1e-3, 1e-3])


def test_learning_rate_scales_the_step(model: Path, groups: list[Group]) -> None:
    start = weights_of(build_learner(model))
    moved = []
    for rate in (1e-4, 2e-4):
        learner = build_learner(model, learning_rate=rate, zero_stage=1)
        learner.update(groups, grpo_advantages(groups))
        moved.append({name: weight - start[name] for name, weight in weights_of(learner).items()})
    for name, step in moved[0].items():
        torch.testing.assert_close(2 * step, moved[1][name], atol=3e-7, rtol=0)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def moments(learner: PolicyLearner) -> list[torch.Tensor]:
    state = torch_optimizer(learner).state
    return [value.clone() for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16")]
)
def test_a_gradient_that_is_not_finite_changes_nothing(
    model: Path, groups: list[Group], stage: int, dtype: str, bad: float
) -> None:
    learner = build_learner(model, zero_stage=stage, dtype=dtype, tokens_per_microbatch=40)
    advantages = grpo_advantages(groups)
    learner.update(groups, advantages)
    weights, before = weights_of(learner), moments(learner)
    assert any(moment.abs().max() > 0 for moment in before)
    tokens = [np.array(t) for t in advantages.tokens]
    tokens[-1][0] = bad
    metrics = learner.update(groups, replace(advantages, tokens=tokens))
    assert metrics["policy/skipped_updates"] == 1
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(learner).items())
    assert all(torch.equal(a, b) for a, b in zip(before, moments(learner), strict=True))
    good = learner.update(groups, advantages)
    assert good["policy/skipped_updates"] == 0
    assert np.isfinite(list(good.values())).all()
    assert not all(torch.equal(weight, weights[name]) for name, weight in weights_of(learner).items())


def test_a_step_without_trainable_samples_changes_no_weight(model: Path, groups: list[Group]) -> None:
    learner = build_learner(model)
    start = weights_of(learner)
    advantages = grpo_advantages(groups)
    metrics = learner.update(groups, replace(advantages, keep=np.zeros_like(advantages.keep)))
    assert metrics["policy/trained_samples"] == 0
    assert np.isfinite(list(metrics.values())).all()
    assert learner.version == 1
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(learner).items())


def test_bfloat16_needs_master_weights(model: Path) -> None:
    with pytest.raises(ValueError, match="zero_stage >= 1"):
        build_learner(model, dtype="bfloat16", zero_stage=0)


def test_bfloat16_keeps_rotary_frequencies_and_small_steps(model: Path, groups: list[Group]) -> None:
    learner = build_learner(model, dtype="bfloat16", zero_stage=1, learning_rate=1e-5)
    exact = build_learner(model)
    buffers, wanted = dict(learner.engine.module.named_buffers()), dict(exact.engine.module.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in buffers.items():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, wanted[name]), name
    assert next(learner.engine.module.parameters()).dtype == torch.bfloat16
    near = zip(learner.group_logprobs(groups), exact.group_logprobs(groups), strict=True)
    assert max(np.abs(a - b).max() for a, b in near) < 0.1
    for _ in range(20):  # each step is far below bf16's spacing; fp32 masters add them up
        learner.update(groups, grpo_advantages(groups))
    start = weights_of(build_learner(model, dtype="bfloat16", zero_stage=1))
    changed = [float((weight != start[name]).float().mean()) for name, weight in weights_of(learner).items()]
    assert max(changed) > 0.05
