"""The implicit PRM: log-ratios, its update, and PRIME's advantages on top of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixture import VOCABULARY, make_groups, write_tiny_model, write_tokenizer

from algorithms.base import Experience
from algorithms.functional.prime import prime_rloo
from algorithms.functional.selection import brier, calibration_error
from algorithms.prime import PRIME
from rewards.base import RewardContext
from rewards.implicit_prm.model import HeldOut, before_update
from rewards.implicit_prm.reward import ImplicitPRM
from rlkit.experience import Group, GroupScores, Score

LN2 = float(np.log(2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("prm") / "model")


def prm(model: Path, **options: object) -> ImplicitPRM:
    config = ImplicitPRM.Config(model_path=str(model), **{"learning_rate": 1e-3, **options})  # type: ignore[arg-type]
    reward = ImplicitPRM(config, RewardContext(threads=1))
    from rewards.implicit_prm.model import ImplicitModel

    reward._model = ImplicitModel(config, reward.context)  # without the verifier's processes: outcomes are given
    return reward


def labelled(seed: int = 0) -> list[Group]:
    """Groups whose outcome can be learnt: right answers use low token ids, wrong ones high ids."""
    groups = []
    rng = np.random.default_rng(seed)
    for group in make_groups(count=6, samples=4, seed=seed):
        samples, scores = [], []
        for i, sample in enumerate(group.samples):
            right = i % 2 == 0
            low, high = (3, VOCABULARY // 2) if right else (VOCABULARY // 2, VOCABULARY)
            samples.append(replace(sample, token_ids=rng.integers(low, high, len(sample)).astype(np.int32)))
            scores.append(Score(value=float(right)))
        groups.append(replace(group, samples=tuple(samples), scores=GroupScores(tuple(scores))))
    return groups


def rescored(reward: ImplicitPRM, groups: list[Group]) -> list[Group]:
    return [group.with_scores(scores) for group, scores in zip(groups, reward.rescore(groups), strict=True)]


def test_equal_weights_give_rewards_of_zero_and_a_first_loss_of_ln_2(model: Path) -> None:
    reward = prm(model)
    groups = rescored(reward, labelled())
    assert max(np.abs(score.token_rewards).max() for g in groups for _, score in g.scored()) < 1e-5
    metrics = reward.update(groups)
    assert metrics["prm/loss"] == pytest.approx(LN2, abs=1e-5)
    assert reward.version == 1


@pytest.mark.parametrize("objective", ["ce", "dpo", "nca", "kto"])
def test_every_objective_learns_to_order_right_before_wrong(model: Path, objective: str) -> None:
    reward = prm(model, objective=objective)
    losses = []
    for seed in range(8):
        metrics = reward.update(rescored(reward, labelled(seed)))
        losses.append(metrics["prm/loss"])
    unseen = rescored(reward, labelled(99))
    accuracy = before_update(unseen)["prm/pair_accuracy"]
    assert losses[-1] < losses[0]
    assert accuracy > 0.8


def test_rewards_are_beta_times_the_log_ratio_and_their_sum_is_the_component(model: Path) -> None:
    small, large = prm(model, beta=0.05), prm(model, beta=0.5)
    large.model.engine.module.load_state_dict(small.model.engine.module.state_dict())
    small.update(rescored(small, labelled()))
    large.model.engine.module.load_state_dict(small.model.engine.module.state_dict())
    groups = labelled(1)
    for a, b in zip(small.rescore(groups), large.rescore(groups), strict=True):
        for one, other in zip(a.samples, b.samples, strict=True):
            np.testing.assert_allclose(10 * one.token_rewards, other.token_rewards, atol=1e-4)
            assert one.components["implicit_prm"] == pytest.approx(float(one.token_rewards.sum()), abs=1e-6)


def test_loss_does_not_depend_on_microbatches(model: Path) -> None:
    groups = labelled()
    losses = []
    for tokens in (40, 16384):
        reward = prm(model, tokens_per_microbatch=tokens)
        reward.update(rescored(reward, groups))
        losses.append(reward.update(rescored(reward, groups))["prm/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] < LN2


def test_gradient_checkpointing_changes_memory_only(model: Path) -> None:
    weights = []
    for checkpointing in (False, True):
        reward = prm(model, gradient_checkpointing=checkpointing)
        reward.update(rescored(reward, labelled()))
        weights.append(dict(reward.model.engine.module.named_parameters()))
        layer = reward.model.engine.module.model.model.layers[0]
        assert layer.gradient_checkpointing == layer.training == checkpointing
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=0)


def masked(groups: list[Group]) -> list[Group]:
    """Every third token is an observation."""
    return [
        replace(group, samples=tuple(replace(s, mask=np.arange(len(s)) % 3 != 1) for s in group.samples))
        for group in groups
    ]


@pytest.mark.parametrize("objective", ["ce", "dpo", "nca", "kto"])
def test_a_group_above_the_token_budget_passes_in_parts(model: Path, objective: str) -> None:
    """Parts repeat the prompt; pairs across parts still count."""
    groups, outcomes = masked(labelled()), []
    longest = max(len(g.prompt.token_ids) + max(map(len, g.samples)) for g in groups)
    for limit in (longest, 16384):
        reward = prm(model, objective=objective, tokens_per_microbatch=limit, learning_rate=1e-2)
        passes: list[int] = []
        for module in (reward.model.engine.module, reward.model.reference.module):
            module.register_forward_pre_hook(lambda _, inputs, passes=passes: passes.append(len(inputs[0].token_ids)))
        scored = rescored(reward, groups)
        metrics = [reward.update(scored) for _ in range(3)][-1]
        rewards = [score.token_rewards for group in rescored(reward, groups) for _, score in group.scored()]
        assert (max(passes) <= limit) and (max(passes) > longest) == (limit > longest)
        outcomes.append((metrics, rewards))
    (parts, of_parts), (whole, of_whole) = outcomes
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    for ours, wanted in zip(of_parts, of_whole, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=3e-4)


def test_scores_are_sums_over_trained_tokens(model: Path) -> None:
    """As the objective sees them: with observations, the sign of the sum of all tokens can be another one."""
    reward = prm(model, heldout_groups=1)
    reward.update(rescored(reward, masked(labelled())))
    groups = rescored(reward, masked(labelled(1)))
    for group in groups:
        for sample, score in group.scored():
            assert score.token_rewards is not None
            trained = float(score.token_rewards[sample.trained].sum())
            assert score.components["implicit_prm"] == pytest.approx(trained, abs=1e-7)
            assert score.components["implicit_prm"] != pytest.approx(float(score.token_rewards.sum()), abs=1e-7)
    alone = prm(model, outcome=None, update="none")
    alone.model.engine.module.load_state_dict(reward.model.engine.module.state_dict())
    for scores, group in zip(alone.score(groups), groups, strict=True):
        assert [s.value for s in scores.samples] == [s.components["implicit_prm"] for _, s in group.scored()]
    held = HeldOut(4)
    held.groups = list(groups)
    rows = []
    for group in groups:
        for i, sample in enumerate(group.samples):  # observations speak against every right answer
            label = 1.0 if i % 2 == 0 else -1.0
            rows.append(np.where(sample.trained, label, -100 * label))
    assert held.metrics(rows)["prm/heldout_pair_accuracy"] == 1.0


def test_invalid_outcomes_stay_invalid_and_do_not_train(model: Path) -> None:
    reward = prm(model)
    groups = [
        replace(group, scores=GroupScores((Score.invalid("timeout: test"),) * len(group.samples)))
        for group in labelled()
    ]
    before = {name: p.detach().clone() for name, p in reward.model.engine.module.named_parameters()}
    scored = rescored(reward, groups)
    assert not any(score.valid for group in scored for _, score in group.scored())
    assert "prm/loss" not in reward.update(scored)
    for name, parameter in reward.model.engine.module.named_parameters():
        assert (parameter == before[name]).all()


def test_state_survives_a_round_trip(model: Path) -> None:
    reward = prm(model)
    reward.update(rescored(reward, labelled()))
    other = prm(model)
    other.load_state_dict(reward.state_dict())
    assert other.version == 1
    groups = labelled(3)
    for a, b in zip(reward.rescore(groups), other.rescore(groups), strict=True):
        np.testing.assert_array_equal(a.samples[0].token_rewards, b.samples[0].token_rewards)


def test_the_policy_as_reference_gives_rewards_against_the_policy_of_the_moment(model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    frozen, following = prm(model, reference_path=str(other)), prm(model, reference="policy")
    assert not ImplicitPRM.traits(frozen.config).follows_policy and ImplicitPRM.traits(following.config).follows_policy
    following.policy_weights(1, list(frozen.model.reference.model.named_parameters()))
    for a, b in zip(frozen.rescore(labelled()), following.rescore(labelled()), strict=True):
        for one, wanted in zip(b.samples, a.samples, strict=True):
            assert np.abs(wanted.token_rewards).max() > 1e-4
            np.testing.assert_array_equal(one.token_rewards, wanted.token_rewards)
    with pytest.raises(ValueError, match="the policy's own architecture"):
        following.policy_weights(2, [])


def test_without_an_outcome_it_is_a_scorer_of_its_own(model: Path) -> None:
    learnt = prm(model)
    learnt.update(rescored(learnt, labelled()))
    alone = prm(model, outcome=None, update="none")
    alone.model.engine.module.load_state_dict(learnt.model.engine.module.state_dict())
    bare = [replace(group, scores=None) for group in labelled(1)]
    for a, b in zip(alone.score(bare), learnt.rescore(labelled(1)), strict=True):
        for one, wanted in zip(a.samples, b.samples, strict=True):
            np.testing.assert_array_equal(one.token_rewards, wanted.token_rewards)
            assert one.value == wanted.components["implicit_prm"]
    assert ImplicitPRM.traits(alone.config).answer is False
    assert not ImplicitPRM.traits(alone.config).judges_texts, "who has texts alone must make tokens of them"
    with pytest.raises(ValueError, match="nothing to learn from"):
        ImplicitPRM.Config(outcome=None)


@pytest.mark.parametrize(("update", "refused"), [("after", True), ("none", False)])
def test_raw_scores_are_no_labels(update: str, refused: bool) -> None:
    polar = {"_target_": "rewards.polar.reward.PolarReward", "backend": "http_vllm", "urls": ["http://127.0.0.1:9"]}
    config = ImplicitPRM.Config(update=update, outcome=polar)  # type: ignore[arg-type]
    assert ImplicitPRM.traits(config).raw_scores, "the values are those of the outcome"
    assert any("gives raw model scores" in message for message in ImplicitPRM.check(config)) is refused
    shaped = {
        "_target_": "rewards.combined.reward.CombinedReward",
        "parts": {"polar": polar},
        "shaping": [{"name": "min_max"}],
    }
    messages = ImplicitPRM.check(ImplicitPRM.Config(update=update, outcome=shaped))  # type: ignore[arg-type]
    assert not any("raw model scores" in message for message in messages)


@pytest.mark.parametrize("when", ["after", "before", "none"])
def test_when_it_learns_is_what_the_pool_asks(when: str) -> None:
    assert ImplicitPRM.traits(ImplicitPRM.Config(update=when)).update_when == when  # type: ignore[arg-type]


def test_what_is_saved_scores_the_same(model: Path, tmp_path: Path) -> None:
    write_tokenizer(model)
    learnt = prm(model)
    learnt.update(rescored(learnt, labelled()))
    learnt.save(tmp_path / "prm")
    loaded = prm(tmp_path / "prm", reference_path=str(model), update="none")
    for a, b in zip(learnt.rescore(labelled(2)), loaded.rescore(labelled(2)), strict=True):
        for one, other in zip(a.samples, b.samples, strict=True):
            np.testing.assert_array_equal(one.token_rewards, other.token_rewards)


def test_some_groups_are_never_learnt_from(model: Path) -> None:
    reward = prm(model, heldout_groups=2)
    equal = [
        replace(g, id=f"equal{i}", scores=GroupScores(tuple(Score(1.0) for _ in g.samples)))
        for i, g in enumerate(labelled(5))
    ]
    reward.update(rescored(reward, equal))
    assert reward.model.heldout.groups == []  # nothing can be ordered there
    first = reward.update(rescored(reward, labelled(0)))
    (kept,) = reward.model.heldout.groups  # a quarter of six groups, rounded down
    assert first["prm/heldout_pair_accuracy"] == pytest.approx(0.5, abs=0.5)
    second = rescored(reward, [replace(g, id=f"second{i}") for i, g in enumerate(labelled(1))])
    assert [g.id for g in reward.model.heldout.set_aside(second)] == [f"second{i}" for i in range(1, 6)]
    assert [g.id for g in reward.model.heldout.set_aside(second)] == [g.id for g in second]  # there are enough now
    assert reward.model.heldout.groups[0] is kept


def test_calibration_by_hand() -> None:
    scores = np.log(np.array([0.25, 0.25, 0.85, 0.85]) / np.array([0.75, 0.75, 0.15, 0.15]))
    labels = np.array([0.0, 1.0, 1.0, 1.0])
    assert brier(scores, labels) == pytest.approx((0.25**2 + 0.75**2 + 2 * 0.15**2) / 4)
    assert calibration_error(scores, labels) == pytest.approx(0.5 * 0.25 + 0.5 * 0.15)
    assert brier(np.array([900.0, -900.0]), np.array([1.0, 0.0])) == 0.0


def test_offloading_on_a_cpu_is_refused(model: Path) -> None:
    config = ImplicitPRM.Config(model_path=str(model), offload=True, outcome=None, update="none")
    with pytest.raises(ValueError, match=r"reward\.offload=true"):
        ImplicitPRM(config, RewardContext()).start()


def with_process(seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for group in make_groups(count=4, samples=3, seed=seed):
        scores = tuple(
            replace(score, token_rewards=(0.05 * rng.standard_normal(len(sample))).astype(np.float32))
            if score.valid
            else score
            for sample, score in group.scored()
        )
        groups.append(replace(group, scores=GroupScores(scores)))
    return groups


def test_prime_is_the_published_combination() -> None:
    groups = with_process()
    made = PRIME(PRIME.Config(samples_per_prompt=3)).advantages(Experience(groups, 1))
    rows = [(g, sample, score) for g, group in enumerate(groups) for sample, score in group.scored()]
    wanted = prime_rloo(
        [np.zeros(len(s)) if c.token_rewards is None else c.token_rewards for _, s, c in rows],
        np.array([c.value or 0.0 for _, _, c in rows]),
        [s.trained for _, s, _ in rows],
        np.array([g for g, _, _ in rows]),
        np.array([c.valid for _, _, c in rows]),
        beta=1.0,
    )
    for got, want in zip(made.tokens, wanted.advantages, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert list(made.keep) == [c.valid for _, _, c in rows]


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.0, 1.0)])
def test_coefficients_really_act(coefficients: tuple[float, float]) -> None:
    process, outcome = coefficients
    config = PRIME.Config(samples_per_prompt=3, process_coefficient=process, outcome_coefficient=outcome)
    made = PRIME(config).advantages(Experience(with_process(), 1))
    both = PRIME(PRIME.Config(samples_per_prompt=3)).advantages(Experience(with_process(), 1))
    assert not np.allclose(np.concatenate(made.tokens), np.concatenate(both.tokens), atol=1e-3)
    if process == 0:  # the outcome alone is equal for all tokens of a response
        assert all(np.ptp(row) < 1e-6 for row in made.tokens)


def test_prime_without_process_rewards_names_the_reward_to_use() -> None:
    with pytest.raises(ValueError, match="reward=implicit_prm"):
        PRIME(PRIME.Config(samples_per_prompt=4)).advantages(Experience(make_groups(), 1))


@pytest.mark.parametrize(
    "options",
    [
        {"kl_in": "reward", "kl_coefficient": 0.1},
        {"mode": "official", "estimator": "grpo"},
        {"mode": "verl", "process_coefficient": 2.0},
        {"process_coefficient": 0.0, "outcome_coefficient": 0.0},
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no effect|leave|nothing"):
        PRIME.Config(**options)  # type: ignore[arg-type]
