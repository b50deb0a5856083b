"""Which forward passes an update makes: within the token budget, none twice, none for samples without a signal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import build_learner, grpo_advantages, make_groups, smooth_steps, weights_of, write_tiny_model

from algorithms.base import AlgorithmNeeds, Experience, LossInputs, LossOutput
from algorithms.grpo import GRPO
from algorithms.rloo import RLOO
from algorithms.surrogate import SurrogateAlgorithm
from rlkit.experience import Group, GroupScores, Score
from rlkit.learner.policy import PolicyLearner
from rlkit.models.packing import PackedBatch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return make_groups(count=4, seed=3)


def test_later_minibatches_take_log_probs_that_the_driver_has(model: Path, groups: list[Group]) -> None:
    def weights(known: bool) -> dict[str, torch.Tensor]:
        learner = smooth_steps(build_learner(model, learning_rate=0.1, minibatches_per_step=2))
        old = learner.group_logprobs(groups)
        passes = count_passes(learner)
        learner.update(groups, grpo_advantages(groups), **({"old_logprobs": old} if known else {}))
        assert len(passes) == (4 if known else 5)  # policy and reference, twice; and the second half's before the step
        return weights_of(learner)

    for name, weight in weights(True).items():
        torch.testing.assert_close(weight, weights(False)[name], atol=1e-6, rtol=0)


def count_passes(learner: PolicyLearner) -> list[int]:
    """Will hold the tokens of every forward pass."""
    passes, forward = [], learner._forward

    def counted(model: Any, packed: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        passes.append(len(packed.token_ids))
        return forward(model, packed)

    learner._forward = counted  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("limit", [1, 20, 40])
def test_every_pass_keeps_to_the_token_budget(model: Path, groups: list[Group], limit: int) -> None:
    """A group above it is split, and its parts repeat the prompt: in log-probs as in the update."""
    longest = max(len(g.prompt.token_ids) + max(map(len, g.samples)) for g in groups)
    assert max(len(g.prompt.token_ids) + sum(map(len, g.samples)) for g in groups) > limit
    whole = build_learner(model)
    learner = build_learner(model, tokens_per_microbatch=limit, minibatches_per_step=2)
    passes = count_passes(learner)
    for which in ("policy", "reference"):
        for ours, wanted in zip(
            learner.group_logprobs(groups, which), whole.group_logprobs(groups, which), strict=True
        ):
            np.testing.assert_allclose(ours, wanted, atol=1e-5)
    learner.update(groups, grpo_advantages(groups))
    assert max(passes) <= max(limit, longest)


class ComputesAll(GRPO):
    def needs(self) -> AlgorithmNeeds:
        return replace(super().needs(), skips_zero_advantages=False)


@pytest.mark.parametrize("equal", [(1,), (1, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("options", [{}, {"minibatches_per_step": 2}, {"zero_stage": 1, "tokens_per_microbatch": 30}])
def test_samples_without_a_signal_need_not_be_computed(
    model: Path, groups: list[Group], equal: tuple[int, ...], options: dict[str, Any]
) -> None:
    groups = [
        group.with_scores(GroupScores((Score(1.0),) * len(group.samples))) if g in equal else group
        for g, group in enumerate(groups)
    ]
    outcomes, tokens = [], []
    for kind in (ComputesAll, GRPO):
        algorithm = kind(GRPO.Config(samples_per_prompt=4, kl_coefficient=0))
        learner = smooth_steps(build_learner(model, algorithm=algorithm, learning_rate=0.1, **options))
        passes = count_passes(learner)
        metrics = [learner.update(groups, algorithm.advantages(Experience(groups, 1))) for _ in range(2)]
        outcomes.append((metrics, weights_of(learner)))
        tokens.append(sum(passes))
    (wanted, wanted_weights), (found, weights) = outcomes
    assert tokens[1] < tokens[0]
    for all_of_them, some in zip(wanted, found, strict=True):
        for name in ("policy/loss", "policy/grad_norm", "policy/optimizer_steps", "policy/trained_samples"):
            assert some[name] == pytest.approx(all_of_them[name], rel=2e-4, abs=2e-6), name
        assert some["policy/silent_samples"] > 0
        assert "policy/silent_samples" not in all_of_them
    for name, weight in wanted_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-6, rtol=1e-4)
    if len(equal) == 1:  # what is measured is the mean over what was computed
        alone = build_learner(model, algorithm=GRPO(GRPO.Config(samples_per_prompt=4, kl_coefficient=0)))
        rest = [group for g, group in enumerate(groups) if g not in equal]
        only = alone.update(rest, grpo_advantages(rest))
        if options.get("minibatches_per_step", 1) == 1:
            for name in ("policy/entropy", "mismatch/logprob_mean", "mismatch/ess", "kl/rollout"):
                assert found[0][name] == pytest.approx(only[name], rel=1e-5), name
    if len(equal) == len(groups):
        assert "policy/entropy" not in found[0]


class OwnLoss(GRPO):
    def loss(self, inputs: LossInputs) -> LossOutput:
        return super().loss(inputs)


def user_surrogate(logprobs: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return -(advantages + 1) * logprobs, torch.zeros_like(logprobs, dtype=torch.bool)


def test_only_losses_known_to_be_multiples_of_the_advantage_skip_it() -> None:
    def skips(kind: type[SurrogateAlgorithm], **options: Any) -> bool:
        return kind(kind.Config(**options)).needs().skips_zero_advantages

    assert skips(GRPO, kl_coefficient=0)
    assert skips(GRPO, kl_coefficient=0, loss="cispo", rollout_correction="truncate", largest_weight=2)
    assert skips(RLOO, kl_coefficient=0.1)  # in the reward
    assert not skips(GRPO)
    assert not skips(RLOO, kl_coefficient=0.1, kl_in="loss", kl_estimator="k2")
    assert not skips(GRPO, kl_coefficient=0, entropy_coefficient=0.01)
    assert not skips(GRPO, kl_coefficient=0, loss=f"{__name__}.user_surrogate")
    assert not skips(OwnLoss, kl_coefficient=0)  # a loss of its own
    assert not AlgorithmNeeds().skips_zero_advantages
