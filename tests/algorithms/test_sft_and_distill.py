"""Fine-tuning is transformers' cross-entropy; distillation's gradient is the reverse KL's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixture import build_learner, make_groups, write_tiny_model
from transformers import AutoModelForCausalLM

from algorithms.base import Experience
from algorithms.distill import Distill
from algorithms.sft import SFT
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score


def test_a_step_is_transformers_cross_entropy(tmp_path: Path) -> None:
    """Value, and the weights after AdamW: over two groups of several recorded responses, one partly masked."""
    model = write_tiny_model(tmp_path / "model")
    groups = [demonstrations(group) for group in make_groups(2, 3)]
    algorithm = SFT(SFT.Config())
    learner = build_learner(model, algorithm=algorithm, learning_rate=0.01)
    metrics = learner.update(groups, algorithm.advantages(Experience(groups, 1)))

    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    total, tokens = 0.0, 0
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids.tolist()]])
            labels = ids.clone()
            labels[0, : len(group.prompt.token_ids)] = -100
            labels[0, len(group.prompt.token_ids) :][torch.from_numpy(~sample.trained)] = -100
            count = int(sample.trained.sum())
            total = total + plain(input_ids=ids, labels=labels).loss * count
            tokens += count
    loss = total / tokens
    loss.backward()
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert "mismatch/logprob_mean" not in metrics
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), learner.config.max_grad_norm)
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0).step()
    after = dict(learner.engine.module.model.named_parameters())
    for name, parameter in plain.named_parameters():
        moved, ours = parameter.detach() - before[name], after[name].detach() - before[name]
        gradient = parameter.grad.abs() > 1e-6  # AdamW's first step is the gradient's sign where it is not rounding
        torch.testing.assert_close(ours[gradient], moved[gradient], atol=2e-4, rtol=1e-2)


def demonstrations(group: Group) -> Group:
    samples = tuple(
        replace(sample, logprobs=None, mask=np.arange(len(sample)) % 3 != 1 if sample.index == 1 else None)
        for sample in group.samples
    )
    scores = GroupScores((Score(1.0),) * len(samples))
    return replace(group, samples=samples, scores=scores)


def test_weights_and_invalid_rows() -> None:
    group = demonstrations(make_groups(1, 3)[0])
    weighted = replace(group, samples=(replace(group.samples[0], weight=0.25), *group.samples[1:]))
    scores = GroupScores((*weighted.scores.samples[:2], Score.invalid("bad: row")))
    advantages = SFT(SFT.Config()).advantages(Experience([replace(weighted, scores=scores)], 1))
    assert advantages.keep.tolist() == [True, True, False]
    assert set(advantages.tokens[0].tolist()) == {0.25} and set(advantages.tokens[1].tolist()) == {1.0}


def test_held_out_log_probs_are_means_over_trained_tokens() -> None:
    group = demonstrations(make_groups(1, 2)[0])
    rows = [np.arange(len(sample), dtype=np.float32) for sample in group.samples]
    trained = np.concatenate([row[sample.trained] for row, sample in zip(rows, group.samples, strict=True)])
    metrics = SFT(SFT.Config()).heldout(Experience([group], 1, policy_logprobs=rows))
    assert metrics == {"logprob/heldout": pytest.approx(trained.mean())}


def test_distillation_credits_each_token_with_the_teachers_log_ratio() -> None:
    sample = Sample(0, np.arange(3, 6, dtype=np.int32), None, "", "stop", (0, 0), 0, np.array([True, False, True]))
    group = Group("g", Prompt("p", (Message("user", "?"),), (1,)), (sample,)).with_scores(GroupScores((Score.none(),)))
    rows = {"policy": [np.array([-1.0, -9.0, -3.0])], "teacher": [np.array([-0.5, -1.0, -4.0])]}
    algorithm = Distill(Distill.Config(teacher="t"))
    advantages = algorithm.advantages(Experience([group], 1, logprobs=rows))
    np.testing.assert_allclose(advantages.tokens[0], [0.5, 0.0, -1.0])
    assert advantages.metrics["distill/reverse_kl"] == pytest.approx(0.25) and advantages.keep.tolist() == [True]
    whole = Distill(Distill.Config(teacher="t", gamma=1.0)).advantages(Experience([group], 1, logprobs=rows))
    np.testing.assert_allclose(whole.tokens[0], [-0.5, 0.0, -1.0])
    assert {one.model for one in algorithm.needs().passes.values()} == {"policy", "t"}
    assert not algorithm.needs().rewards


def test_the_expected_gradient_is_the_reverse_kls() -> None:
    """Over all sequences of two tokens from three: gamma = 1 gives the gradient of KL(policy || teacher)."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
    first.requires_grad_(), second.requires_grad_()
    teacher = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)

    def logprobs(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """[9, 2] of all sequences."""
        return torch.stack(
            [torch.stack([one.log_softmax(0)[a], two[a].log_softmax(0)[b]]) for a in range(3) for b in range(3)]
        )

    policy, wanted = logprobs(first, second), logprobs(*teacher)
    probability = policy.sum(1).exp()
    kl = (probability * (policy - wanted).sum(1)).sum()
    exact = torch.autograd.grad(kl, (first, second), retain_graph=True)
    surrogate = torch.zeros(())
    for i in range(9):
        tokens = np.zeros(2, np.int32)
        sample = Sample(0, tokens, None, "", "stop", (0, 0), 0)
        group = Group("g", Prompt("p", (Message("user", "?"),), (1,)), (sample,))
        group = group.with_scores(GroupScores((Score.none(),)))
        rows = {"policy": [policy[i].detach().numpy()], "teacher": [wanted[i].numpy()]}
        algorithm = Distill(Distill.Config(teacher="t", gamma=1.0))
        credit = torch.from_numpy(algorithm.advantages(Experience([group], 1, logprobs=rows)).tokens[0])
        surrogate = surrogate - probability[i].detach() * (credit * policy[i]).sum()
    for ours, theirs in zip(torch.autograd.grad(surrogate, (first, second)), exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
