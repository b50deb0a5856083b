"""Pairs, values per sample, recorded samples, several epochs, and references: what reaches a loss."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import build_learner, grpo_advantages, make_groups, write_tiny_model
from safetensors.numpy import load_file, save_file

from algorithms.base import (
    REFERENCE,
    Advantages,
    Algorithm,
    AlgorithmConfig,
    AlgorithmNeeds,
    Experience,
    LossInputs,
    LossOutput,
    Pass,
)
from algorithms.grpo import GRPO
from rlkit.config.schema import LearnerConfig
from rlkit.experience import Group, UserError
from rlkit.learner.dealing import policy_shares
from rlkit.learner.frozen import blend
from rlkit.learner.references import ReferenceCache, ReferenceError, fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


class Pairwise(Algorithm):
    """-weight log sigmoid(log-ratio of better - of worse - margin), with values that only this sample can have."""

    def __init__(self, layout: Any = "full_group", reference: bool = False) -> None:
        super().__init__(AlgorithmConfig(reference_every_steps=int(reference), reference_mix=0.5))
        self.layout, self.reference = layout, reference

    def needs(self) -> AlgorithmNeeds:
        return AlgorithmNeeds(layout=self.layout, reference_policy=self.reference)

    def advantages(self, experience: Experience) -> Advantages:
        samples = [sample for group in experience.groups for sample in group.samples]
        starts = np.cumsum([0, *(len(group.samples) for group in experience.groups)])[:-1]
        pairs = np.array([(s + i, s + j) for s in starts for i, j in ((0, 2), (3, 2), (0, 1))])
        keep = np.ones(len(samples), bool)
        keep[starts + 1] = False  # a pair of each group loses a sample
        return Advantages(
            tokens=[np.zeros(len(sample), np.float32) for sample in samples],
            keep=keep,
            samples={"length": np.array([len(sample) for sample in samples], np.float32)},
            pairs=pairs,
            pair_values={"margin": 0.01 * np.arange(len(pairs)), "lengths": self._lengths(samples, pairs)},
        )

    @staticmethod
    def _lengths(samples: Sequence[Any], pairs: np.ndarray) -> np.ndarray:
        return np.array([len(samples[a]) + 100.0 * len(samples[b]) for a, b in pairs])

    def loss(self, inputs: LossInputs) -> LossOutput:
        assert inputs.pairs is not None
        s = inputs.logprobs.new_zeros(inputs.num_sequences).index_add(0, inputs.sequence, inputs.logprobs)
        tokens = inputs.mask.new_zeros(inputs.num_sequences).index_add(0, inputs.sequence, torch.ones_like(inputs.mask))
        assert torch.equal(tokens, inputs.samples["length"])
        better, worse = inputs.pairs.unbind(1)
        assert torch.equal(tokens[better] + 100 * tokens[worse], inputs.pair_values["lengths"])
        rows = -torch.nn.functional.logsigmoid(s[better] - s[worse] - inputs.pair_values["margin"])
        total = rows.sum() / inputs.denominators.pairs
        return LossOutput(loss=total, sums={"pairs": rows.new_tensor(len(rows) / inputs.denominators.pairs)})


def step(model: Path, groups: list[Group], algorithm: Algorithm, **options: Any) -> tuple[dict[str, float], list[Any]]:
    learner = build_learner(model, algorithm=algorithm, learning_rate=0.01, **options)
    metrics = learner.update(groups, algorithm.advantages(Experience(groups, 1)))
    return metrics, [parameter.detach().clone() for parameter in learner.engine.module.parameters()]


@pytest.mark.parametrize("limit", [30, 200])
def test_the_gradient_of_pairs_does_not_depend_on_micro_batches(model: Path, limit: int) -> None:
    groups = make_groups(5)
    whole, weights = step(model, groups, Pairwise())
    cut, others = step(model, groups, Pairwise(), tokens_per_microbatch=limit)
    assert cut["policy/loss"] == pytest.approx(whole["policy/loss"], rel=1e-5) and whole["pairs"] == pytest.approx(1.0)
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_denominators_count_the_pairs_of_an_optimizer_step() -> None:
    groups, algorithm = make_groups(4), Pairwise()
    advantages = algorithm.advantages(Experience(groups, 1))
    (share,), _ = policy_shares(groups, advantages, LearnerConfig(minibatches_per_step=2), algorithm.needs())
    assert [minibatch.denominators.pairs for minibatch in share.minibatches] == [4, 4], (
        "one of three in each group is out"
    )


def test_pairs_that_a_layout_would_part_are_refused() -> None:
    groups, algorithm = make_groups(2), Pairwise("any")
    with pytest.raises(ValueError, match="lets micro-batches separate them"):
        policy_shares(groups, algorithm.advantages(Experience(groups, 1)), LearnerConfig(), algorithm.needs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": np.array([[0, 4]])}, "two groups"),
        ({"pairs": np.array([[0, 99]])}, "from 0 to 7"),
        ({"pair_values": {"margin": np.zeros(1)}}, "6 pairs, but 1 values"),
        ({"samples": {"length": np.zeros(3)}}, "8 samples, but 3 values"),
    ],
)
def test_pairs_out_of_order_are_named(change: dict[str, Any], message: str) -> None:
    groups, algorithm = make_groups(2), Pairwise()
    experience = Experience(groups, 1)
    advantages = replace(algorithm.advantages(experience), **change)
    with pytest.raises(UserError, match=message):
        advantages.check(experience, algorithm)


class Ages(GRPO):
    """Reports how far the policy has moved from the old log-probs."""

    def loss(self, inputs: LossInputs) -> LossOutput:
        moved = (inputs.logprobs - inputs.old_logprobs).detach().abs().max()
        return replace(super().loss(inputs), maxima={"moved": moved})


def test_further_epochs_keep_the_log_probs_before_the_step_and_shuffle(model: Path) -> None:
    groups = make_groups(6)
    algorithm = Ages(Ages.Config(kl_coefficient=0.0))
    learner = build_learner(model, algorithm=algorithm, learning_rate=0.01, minibatches_per_step=2, epochs_per_step=3)
    advantages = grpo_advantages(groups)
    old = learner.group_logprobs(groups)
    (share,), _ = policy_shares(groups, advantages, learner.config, algorithm.needs(), seed=(0, 1), old_logprobs=old)
    prompts = [[p.tolist() for micro, _ in m.microbatches for p in micro.prompts] for m in share.minibatches]
    epochs = [prompts[i] + prompts[i + 1] for i in (0, 2, 4)]
    own = [list(group.prompt.token_ids) for group in groups]
    assert all(sorted(epoch) == sorted(own) for epoch in epochs)
    assert sorted(prompts[0]) == sorted(own[:3]), "the first epoch keeps the order"
    assert len({str(epoch) for epoch in epochs}) == 3
    assert learner.learn(share)["moved"] > 1e-4
    assert learner.optimizer_steps == 6
    single = build_learner(model, algorithm=algorithm, learning_rate=0.01)
    assert single.update(groups, advantages)["moved"] == 0.0


def test_recorded_samples_have_no_mismatch_and_ratio_one(model: Path) -> None:
    groups = make_groups(3)
    recorded = [replace(g, samples=tuple(replace(s, logprobs=None) for s in g.samples)) for g in groups]
    learner = build_learner(model)
    assert "mismatch/logprob_mean" not in learner.update(recorded, grpo_advantages(recorded))
    mixed = [recorded[0], *groups[1:]]
    learner = build_learner(model)
    assert np.isfinite(learner.update(mixed, grpo_advantages(mixed))["mismatch/logprob_mean"])


def test_the_effective_size_is_that_of_the_weights(model: Path) -> None:
    groups = make_groups(3)
    ages = np.random.default_rng(3)
    learner = build_learner(model, algorithm=Ages(Ages.Config()))  # computes all samples
    own, sampled, weights = iter(learner.group_logprobs(groups)), [], []
    for group in groups:
        samples = []
        for sample, row in zip(group.samples, own, strict=False):
            weight = ages.choice([0.5, 1.0, 3.0], len(row))
            samples.append(replace(sample, logprobs=(row - np.log(weight)).astype(np.float32)))
            if group.prompt.id != "p0" or sample.index != 1:  # which has no valid score
                weights.append(weight[sample.trained])
        sampled.append(replace(group, samples=tuple(samples)))
    w = np.concatenate(weights)
    metrics = learner.update(sampled, grpo_advantages(sampled))
    assert metrics["mismatch/ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-4)
    assert not any("moment" in name for name in metrics)


def test_a_reference_moves_towards_the_policy_and_is_saved(model: Path, tmp_path: Path) -> None:
    groups, algorithm = make_groups(4), Pairwise(reference=True)
    learner = build_learner(model, algorithm=algorithm, learning_rate=0.01)
    before = [parameter.detach().clone() for parameter in learner.engine.module.parameters()]
    learner.update(groups, algorithm.advantages(Experience(groups, 1)))
    after = learner.engine.module.parameters()
    for reference, old, new in zip(learner.frozen[REFERENCE].parameters(), before, after, strict=True):
        torch.testing.assert_close(reference, old + 0.5 * (new - old))
    wanted = learner.group_logprobs(groups, REFERENCE)
    learner.save(tmp_path / "reference", REFERENCE)
    fresh = build_learner(model, algorithm=algorithm)
    fresh.hold(REFERENCE, tmp_path / "reference")
    for one, other in zip(fresh.group_logprobs(groups, REFERENCE), wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_named_by_a_pass_is_held(model: Path) -> None:
    class Guided(GRPO):
        def needs(self) -> AlgorithmNeeds:
            return replace(super().needs(), passes={"guide": Pass(str(model))})

    learner, groups = build_learner(model, algorithm=Guided(Guided.Config())), make_groups(2)
    for guide, policy in zip(learner.group_logprobs(groups, str(model)), learner.group_logprobs(groups), strict=True):
        np.testing.assert_array_equal(guide, policy)
    with pytest.raises(ValueError, match="holds no model 'other'"):
        learner.group_logprobs(groups, "other")


def test_reference_log_probs_are_computed_once_per_model_prompt_and_response(model: Path, tmp_path: Path) -> None:
    groups, computed = make_groups(6), []

    async def compute(some: Sequence[Group]) -> list[np.ndarray]:
        computed.extend(group.id for group in some)
        return [np.arange(len(s), dtype=np.float32) + int(group.id[1:]) for group in some for s in group.samples]

    file = tmp_path / "shared" / "reference.safetensors"
    first = ReferenceCache(file, fingerprint(model, 1.0))
    assert asyncio.run(first.fill(groups[:4], compute, at_once=3)) == 16
    again = ReferenceCache(file, fingerprint(model, 1.0))
    assert asyncio.run(again.fill(groups, compute, at_once=3)) == 8 and computed == [f"g{i}" for i in range(6)]
    for row, wanted in zip(again.of(groups), asyncio.run(compute(groups)), strict=True):
        np.testing.assert_array_equal(row, wanted)
    other = ReferenceCache(file, fingerprint(model, 0.7))
    with pytest.raises(ReferenceError, match="no reference log-probs for some of the data"):
        other.of(groups)
    file.write_bytes(b"half a file")
    with pytest.raises(ReferenceError, match="delete it"):
        ReferenceCache(file, fingerprint(model, 1.0))


def test_models_that_differ_in_one_tensor_share_no_log_probs(model: Path, tmp_path: Path) -> None:
    """A merged adapter leaves the beginning and the end of the file as they were."""
    before = fingerprint(model, 1.0)
    weights = load_file(model / "model.safetensors")
    for folder in (tmp_path / "same", tmp_path / "other"):
        shutil.copytree(model, folder)
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] += 1.0
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(tmp_path / "same", 1.0) == before != fingerprint(tmp_path / "other", 1.0)


def test_two_runs_fill_one_file_at_once(model: Path, tmp_path: Path) -> None:
    groups, file = make_groups(6), tmp_path / "reference.safetensors"

    async def compute(some: Sequence[Group]) -> list[np.ndarray]:
        return [np.arange(len(s), dtype=np.float32) for group in some for s in group.samples]

    one, other = (ReferenceCache(file, fingerprint(model, 1.0)) for _ in range(2))
    asyncio.run(one.fill(groups[:3], compute, at_once=1))
    asyncio.run(other.fill(groups[3:], compute, at_once=1))
    assert len(ReferenceCache(file, fingerprint(model, 1.0)).of(groups)) == 24
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing is left beside it"


def test_small_steps_of_a_reference_in_bfloat16_add_up() -> None:
    """Rounded to the nearest, a reference would never move by a thousandth."""
    mine, its = torch.full((4096,), 1.0, dtype=torch.bfloat16), torch.full((4096,), 1.5, dtype=torch.bfloat16)
    assert torch.equal(mine.clone().lerp_(its, 1e-3), mine)
    for step in range(100):
        blend(mine, its, 1e-3, torch.Generator().manual_seed(step))
    assert mine.float().mean() == pytest.approx(1.5 - 0.5 * (1 - 1e-3) ** 100, abs=0.01)
    again = its.clone()
    blend(again, its, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(again, its)
