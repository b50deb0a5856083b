"""Weights and moments out of one DeepSpeed engine and into another, to the last bit, whatever the ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_fixture import build_learner, grpo_advantages, make_groups, weights_of, write_tiny_model

from rlkit.learner.policy import PolicyLearner
from rlkit.learner.state import full_state, load_full_state

SETTINGS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("state") / "model")


def train(learner: PolicyLearner, seed: int) -> None:
    groups = make_groups(seed=seed)
    learner.update(groups, grpo_advantages(groups))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("stage", "dtype"), SETTINGS)
def test_training_goes_on_as_if_nothing_had_happened(model: Path, stage: int, dtype: str) -> None:
    first = build_learner(model, zero_stage=stage, dtype=dtype)
    train(first, 0)
    train(first, 1)
    state = full_state(first.engine)
    second = build_learner(model, zero_stage=stage, dtype=dtype)
    fresh = full_state(second.engine)
    assert int(fresh["optimizer_step"]) == 0 and not any(name.startswith("exp_avg") for name in fresh)
    load_full_state(second.engine, state)
    assert int(state["optimizer_step"]) == 2
    assert equal(full_state(second.engine), state)
    assert equal(weights_of(first), weights_of(second))
    train(first, 2)
    train(second, 2)
    assert equal(full_state(second.engine), full_state(first.engine))
    assert equal(weights_of(first), weights_of(second))
    assert not equal(full_state(first.engine), state)


def test_another_stage_goes_on_from_it(model: Path) -> None:
    first = build_learner(model, zero_stage=0)
    train(first, 0)
    for stage in (1, 3):
        second = build_learner(model, zero_stage=stage)
        load_full_state(second.engine, full_state(first.engine))
        assert equal(weights_of(first), weights_of(second))
        assert equal(full_state(second.engine), full_state(first.engine))


def test_another_model_is_refused(model: Path) -> None:
    learner = build_learner(model)
    state = full_state(learner.engine)
    name = next(name for name in state if name.startswith("weight/"))
    with pytest.raises(ValueError, match=f"no {name} of shape"):
        load_full_state(learner.engine, {**state, name: state[name][:1]})
