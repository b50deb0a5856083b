"""Layers' inputs that wait in host memory: the same update to the last bit, and nothing of them stays."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from learner_fixture import WholeLearner, build_learner, grpo_advantages, make_groups, weights_of, write_tiny_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rlkit.models.packing import Tree, pack


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def learner(model: Path, offload: bool, stage: int = 1) -> WholeLearner:
    return build_learner(model, gradient_checkpointing=True, offload_activations=offload, zero_stage=stage)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_is_the_same_to_the_last_bit(model: Path, stage: int) -> None:
    groups = make_groups(count=3, seed=4)
    results = []
    for offload in (False, True):
        one = learner(model, offload, stage)
        metrics = [one.update(groups, grpo_advantages(groups)) for _ in range(2)]
        results.append((metrics, weights_of(one)))
    assert results[0][0] == results[1][0]
    for name, weight in results[0][1].items():
        assert torch.equal(weight, results[1][1][name]), name


@pytest.mark.parametrize("offload", [False, True])
def test_inputs_of_layers_are_not_kept_where_they_were(model: Path, offload: bool) -> None:
    module = learner(model, offload).engine.module
    inputs: list[weakref.ref[torch.Tensor]] = []
    for layer in module.modules():
        if isinstance(layer, LlamaDecoderLayer):
            layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    logprobs, _ = module(pack([Tree(range(3, 20), (range(3, 30), range(5, 9)))]))
    assert len(inputs) == 2
    assert [state() is None for state in inputs] == [offload] * 2
    logprobs.sum().backward()
