"""Samples of several segments: each is a row of its own, and everything counts the sample once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_fixture import (
    WholeCritic,
    build_learner,
    grpo_advantages,
    make_groups,
    segmented,
    smooth_steps,
    weights_of,
    write_tiny_model,
)

from algorithms.base import Advantages, AlgorithmNeeds
from algorithms.grpo import GRPO
from algorithms.ppo import PPO
from rlkit.config.schema import CriticConfig, LearnerConfig
from rlkit.experience import Group, Sample
from rlkit.experience.records import from_json, to_json
from rlkit.learner.dealing import passes, policy_shares
from rlkit.models.packing import Tree, pack


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


def make_segmented(count: int = 4, samples: int = 4, seed: int = 3) -> list[Group]:
    return segmented(make_groups(count, samples, seed), seed)


def one_by_one(learner: Any, sample: Sample, prompt: tuple[int, ...]) -> torch.Tensor:
    """[T] log-probs, each row in a pass of its own."""
    rows, start = [], 0
    for context, length in sample.rows(np.array(prompt, np.int32)):
        tree = Tree(context.tolist(), (sample.token_ids[start : start + length].tolist(),))
        rows.append(learner.engine.module(pack([tree]), 1.0, 2**24)[0])
        start += length
    return torch.cat(rows)


def test_log_probs_and_gradient_are_those_of_the_rows_one_by_one(model: Path) -> None:
    groups = make_segmented()
    assert sum(len(s.segments) > 1 for g in groups for s in g.samples) > 5
    learner = build_learner(model, tokens_per_microbatch=70)
    samples = [(s, g.prompt.token_ids) for g in groups for s in g.samples]
    expected = [one_by_one(learner, *pair) for pair in samples]
    for have, want in zip(learner.group_logprobs(groups), expected, strict=True):
        np.testing.assert_allclose(have, want.detach(), atol=5e-6)  # a few last places of -8 in fp32
    advantages = grpo_advantages(groups)
    kept = [i for i, (s, _) in enumerate(samples) if advantages.keep[i] and s.trained.any()]
    # Equation 3 of GRPO at ratios of 1: the mean over samples of the mean over their trained tokens, in whatever rows.
    loss = torch.zeros(())
    for i in kept:
        mask = torch.from_numpy(samples[i][0].trained).float()
        own = torch.from_numpy(np.asarray(advantages.tokens[i], np.float32))
        loss -= (expected[i] * own * mask).sum() / mask.sum() / len(kept)
    loss.backward()
    norm = float(sum(p.grad.square().sum() for p in learner.engine.module.parameters() if p.grad is not None) ** 0.5)
    metrics = build_learner(model, tokens_per_microbatch=70).update(groups, advantages)
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"tokens_per_microbatch": 90}, {"tokens_per_microbatch": 30}, {"tokens_per_microbatch": 1}, {"zero_stage": 2}],
)
def test_an_update_does_not_depend_on_micro_batches(model: Path, options: dict[str, Any]) -> None:
    groups = make_segmented()
    algorithm = GRPO(GRPO.Config(samples_per_prompt=4, loss="gspo", clip_low=0.1))  # ratios of whole samples
    outcomes = []
    for own in ({}, options):
        learner = smooth_steps(build_learner(model, algorithm=algorithm, learning_rate=0.1, **own))
        outcomes.append(([learner.update(groups, grpo_advantages(groups)) for _ in range(2)], weights_of(learner)))
    (wanted, weights), (got, others) = outcomes
    for want, have in zip(wanted, got, strict=True):
        for name, value in want.items():
            assert have[name] == pytest.approx(value, rel=5e-4, abs=5e-6), name
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=1e-4, rtol=0)


def test_values_of_a_critic_are_those_of_the_rows(model: Path) -> None:
    groups = make_segmented()
    build_learner(model)  # the process group
    config = CriticConfig(dtype="float32", tokens_per_microbatch=60, learning_rate=0.1)
    critic = WholeCritic(model, config, PPO(PPO.Config()), device="cpu", total_steps=10)
    rows = [np.zeros(len(s), np.float32) for g in groups for s in g.samples]
    ones = [row + 1 for row in rows]
    critic.update(groups, Advantages(rows, np.ones(len(rows), np.bool_), returns=ones), rows)  # a new one says zero
    values = iter(critic.group_values(groups))
    assert any(row.any() for row in critic.group_values(groups))
    for group in groups:
        for sample in group.samples:
            start, value = 0, next(values)
            for context, length in sample.rows(np.array(group.prompt.token_ids, np.int32)):
                tree = Tree(context.tolist(), (sample.token_ids[start : start + length].tolist(),))
                alone = critic.engine.module(pack([tree])).detach()
                np.testing.assert_allclose(value[start : start + length], alone, atol=2e-6)
                start += length


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99), st.integers(1, 4), st.integers(1, 150))
def test_a_plan_computes_every_row_once(count: int, samples: int, seed: int, ranks: int, limit: int) -> None:
    groups = make_segmented(count, samples, seed)
    config = LearnerConfig(ranks=ranks, tokens_per_microbatch=limit)
    wanted = Counter(
        (tuple(context.tolist()), length)
        for g in groups
        for s in g.samples
        for context, length in s.rows(np.array(g.prompt.token_ids, np.int32))
    )
    work = passes(groups, config)
    planned: Counter[tuple[tuple[int, ...], int]] = Counter()
    for of_rank in work.microbatches:
        for micro in of_rank:
            assert sum(map(sum, micro.rows)) == len(micro.token_ids) == micro.lengths.sum()
            packed = micro.packed("cpu")
            assert packed.targets.tolist() == micro.token_ids.tolist(), "sample after sample"
            if micro.prompts[0].any():  # no idle one
                planned += Counter(
                    (tuple(prompt.tolist()), length)
                    for prompt, lengths in zip(micro.prompts, micro.rows, strict=True)
                    for length in lengths
                )
                if sum(micro.sizes) > 1:
                    charged = sum(
                        Tree(p.tolist(), [range(n) for n in ns]).charged_tokens
                        for p, ns in zip(micro.prompts, micro.rows, strict=True)
                    )
                    assert charged <= limit
    assert planned == wanted
    results = [np.concatenate([micro.token_ids for micro in of_rank]) for of_rank in work.microbatches]
    for sample, row in zip((s for g in groups for s in g.samples), work.per_sample(results), strict=True):
        np.testing.assert_array_equal(row, sample.token_ids)


def test_a_sample_counts_once_in_denominators(model: Path) -> None:
    groups = make_segmented()
    whole = [replace(g, samples=tuple(replace(s, segments=()) for s in g.samples)) for g in groups]
    (one,), _ = policy_shares(groups, grpo_advantages(groups), LearnerConfig(), AlgorithmNeeds())
    (other,), _ = policy_shares(whole, grpo_advantages(whole), LearnerConfig(), AlgorithmNeeds())
    assert [m.denominators for m in one.minibatches] == [m.denominators for m in other.minibatches]
    for (micro, _), (flat, _) in zip(one.minibatches[0].microbatches, other.minibatches[0].microbatches, strict=True):
        assert np.bincount(micro.sequence("cpu")).tolist() == micro.lengths.tolist()  # micro-batches differ in order
        assert sorted(micro.lengths) == sorted(flat.lengths) and sorted(micro.sizes) == sorted(flat.sizes)
        assert len(flat.prompts) == len(flat.sizes), "without segments: a group, a prompt"


def test_segments_are_whole_and_live_in_checkpoints() -> None:
    (group, *_) = make_segmented()
    (sample, *_) = [s for s in group.samples if len(s.segments) > 1]
    again = from_json(to_json(sample))
    assert [(s.start, s.end, s.context.tolist(), s.messages) for s in again.segments] == [
        (s.start, s.end, s.context.tolist(), s.messages) for s in sample.segments
    ]
    older = {key: value for key, value in to_json(sample).items() if key != "segments"}
    assert from_json(older).segments == (), "a checkpoint from before"
    with pytest.raises(ValueError, match="segments do not cover"):
        replace(sample, segments=sample.segments[1:])
