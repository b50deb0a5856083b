"""The critic against plain transformers, and PPO's advantages and losses against worked values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixture import WholeCritic, build_learner, make_groups, write_tiny_model
from transformers import AutoModelForSequenceClassification

from algorithms.base import Advantages, Denominators, Experience, ValueLossInputs
from algorithms.ppo import PPO
from rlkit.config.schema import CriticConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("critic") / "model")
    build_learner(folder)  # the process group
    return folder


def critic(model: Path, **options: object) -> WholeCritic:
    config = CriticConfig(**{"learning_rate": 1e-2, "dtype": "float32", **options})  # type: ignore[arg-type]
    return WholeCritic(model, config, PPO(PPO.Config()), device="cpu", total_steps=10)


def regression(groups: list, target: float) -> tuple[Advantages, list[np.ndarray]]:
    lengths = [len(sample) for group in groups for sample in group.samples]
    rows = [np.zeros(n, dtype=np.float32) for n in lengths]
    returns = [np.full(n, target, dtype=np.float32) for n in lengths]
    return Advantages(tokens=rows, keep=np.ones(len(lengths), dtype=np.bool_), returns=returns), rows


def test_a_new_critic_values_everything_at_zero(model: Path) -> None:
    assert all(not values.any() for values in critic(model).group_values(make_groups()))


def test_values_equal_plain_transformers_on_each_sequence(model: Path) -> None:
    ours, groups = critic(model), make_groups()
    advantages, old = regression(groups, 1.0)
    ours.update(groups, advantages, old)  # a head that is not zero
    state = {name: p.detach().clone() for name, p in ours.engine.module.model.named_parameters()}
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    plain.load_state_dict(state, strict=False)
    wanted = []
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids.tolist()]])
            hidden = plain.model(ids).last_hidden_state
            first = len(group.prompt.token_ids) - 1
            wanted.append(plain.score(hidden)[0, first:-1, 0].detach().numpy())
    for got, want in zip(ours.group_values(groups), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_critic_takes_optimizer_steps_of_its_own(model: Path) -> None:
    """Open-Reasoner-Zero: several for each one of the policy. Each is on an equal share of the step's groups."""
    several, single, groups = critic(model, minibatches_per_step=4), critic(model), make_groups()
    advantages, old = regression(groups, 0.7)
    several.update(groups, advantages, old)
    single.update(groups, advantages, old)
    assert (several.counters(), single.counters()) == ({"optimizer_steps": 4}, {"optimizer_steps": 1})


@pytest.mark.parametrize("options", [{"tokens_per_microbatch": 40}, {"zero_stage": 1}])
def test_the_update_does_not_depend_on_how_it_is_cut(model: Path, options: dict[str, int]) -> None:
    groups = make_groups()
    advantages, old = regression(groups, 0.7)
    whole, cut = critic(model), critic(model, **options)
    first, second = (one.update(groups, advantages, old) for one in (whole, cut))
    assert second["critic/loss"] == pytest.approx(first["critic/loss"], abs=1e-6)
    assert second["critic/grad_norm"] == pytest.approx(first["critic/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("limit", [1, 30])
def test_values_keep_to_the_token_budget(model: Path, limit: int) -> None:
    whole, cut, groups = critic(model), critic(model, tokens_per_microbatch=limit), make_groups()
    advantages, old = regression(groups, 1.0)
    whole.update(groups, advantages, old)  # a head that is not zero
    cut.engine.module.load_state_dict(whole.engine.module.state_dict())
    longest = max(len(g.prompt.token_ids) + max(map(len, g.samples)) for g in groups)
    seen: list[int] = []
    cut.engine.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0].token_ids)))
    for got, want in zip(cut.group_values(groups), whole.group_values(groups), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert max(seen) <= max(limit, longest)


def test_the_critic_learns(model: Path) -> None:
    ours, groups = critic(model), make_groups()
    advantages, _ = regression(groups, 1.0)
    losses = [ours.update(groups, advantages, ours.group_values(groups))["critic/loss"] for _ in range(15)]
    assert losses[0] == pytest.approx(0.5, abs=1e-6)  # (0 - 1)^2 / 2
    assert losses[-1] < 0.1 * losses[0]


def experience(values: float = 0.0) -> Experience:
    groups = make_groups(count=3, samples=2)
    rows = [np.full(len(s), values, dtype=np.float32) for g in groups for s in g.samples]
    return Experience(groups, 1, values=rows)


def test_undiscounted_advantages_are_reward_minus_value_and_returns_the_reward() -> None:
    made = PPO(PPO.Config(whiten_advantages=False)).advantages(experience(0.25))
    scores = [score for group in experience().groups for _, score in group.scored()]
    for row, returns, score, keep in zip(made.tokens, made.returns or (), scores, made.keep, strict=True):
        assert keep == score.valid
        if score.valid:
            np.testing.assert_allclose(row, score.value - 0.25, atol=1e-6)
            np.testing.assert_allclose(returns, score.value, atol=1e-6)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_trained_tokens() -> None:
    made = PPO(PPO.Config()).advantages(experience())
    kept = np.concatenate([row for row, keep in zip(made.tokens, made.keep, strict=True) if keep])
    assert kept.mean() == pytest.approx(0, abs=1e-6)
    assert kept.var(ddof=1) == pytest.approx(1, abs=1e-4)


def test_token_process_rewards_enter_the_returns() -> None:
    group = make_groups(count=1, samples=2)[0]
    scores = group.scores
    assert scores is not None
    length = len(group.samples[0])
    process = np.arange(length, dtype=np.float32)
    first = replace(scores.samples[0], token_rewards=process)
    changed = replace(group, scores=replace(scores, samples=(first, *scores.samples[1:])))
    rows = [np.zeros(len(s), dtype=np.float32) for s in group.samples]
    made = PPO(PPO.Config(whiten_advantages=False, process_coefficient=0.5)).advantages(
        Experience([changed], 1, values=rows)
    )
    assert made.returns is not None
    np.testing.assert_allclose(made.returns[0], first.value + 0.5 * np.cumsum(process[::-1])[::-1], atol=1e-5)


def test_value_loss_is_clipped_around_the_old_values() -> None:
    algorithm = PPO(PPO.Config(value_clip=0.2))
    values = torch.tensor([1.0, 0.1, 5.0], requires_grad=True)
    output = algorithm.value_loss(
        ValueLossInputs(
            values=values,
            old_values=torch.zeros(3),
            returns=torch.ones(3),
            mask=torch.tensor([1.0, 1.0, 0.0]),
            sequence=torch.tensor([0, 0, 1]),
            num_sequences=2,
            denominators=Denominators(tokens=2.0, sequences=1.0, groups=1.0),
        )
    )
    output.loss.backward()
    # token 1: max(0, (0.2 - 1)^2) / 2, clipped, no gradient; token 2: (0.1 - 1)^2 / 2; token 3 is masked
    assert output.loss.item() == pytest.approx((0.64 / 2 + 0.81 / 2) / 2)
    np.testing.assert_allclose(values.grad.numpy(), [0.0, -0.45, 0.0], atol=1e-6)
    assert output.sums["critic/clip_share"].item() == pytest.approx(0.5)


def test_ppo_without_values_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="critic's values"):
        PPO(PPO.Config()).advantages(Experience(make_groups(), 1))
