"""Published and saved weights have the names and shapes of the checkpoint they were loaded from (review B7)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from learner_fixture import build_learner
from paths import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlkit.learner.policy_folder import parameter_metas, save_policy, with_buffers
from rlkit.learner.weight_names import CheckpointNames
from rlkit.weights.bundle import TensorMeta

sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures

TYPES = ("llama", "mixtral", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "minimax_m2", "gpt_neox", "gpt_oss")


@pytest.mark.parametrize("model_type", TYPES)
def test_names_and_tensors_are_those_of_the_checkpoint(model_type: str, tmp_path: Path) -> None:
    config = architectures.tiny_config(next(row for row in architectures.ROWS if row.model_type == model_type))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    checkpoint = load_file(tmp_path / "model" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    names = CheckpointNames(model, parameter_metas(model))
    sent = [(name, tensor.detach()) for name, tensor in names.convert(model.named_parameters())]
    assert names.metas == [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent]
    assert {name for name, _ in sent} == set(checkpoint) - {name for name in checkpoint if "correction_bias" in name}
    for name, tensor in sent:
        assert torch.equal(tensor, checkpoint[name]), name

    save_policy(model, *with_buffers(model, parameter_metas(model), model.named_parameters()), tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(saved[name], checkpoint[name]) for name in checkpoint)


def test_what_training_leaves_is_published_with_what_it_changes(tmp_path: Path) -> None:
    """vLLM holds the router's bias as a parameter, which an engine that slept has lost."""
    config = architectures.tiny_config(next(row for row in architectures.ROWS if row.model_type == "glm4_moe"))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    checkpoint = load_file(tmp_path / "model.safetensors")
    assert any("correction_bias" in name for name in checkpoint)
    learner = build_learner(tmp_path)
    sent = dict(learner.named_weights())
    assert [meta.name for meta in learner.weight_metas()] == list(sent)
    assert sent.keys() == checkpoint.keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in checkpoint.items())


def test_a_model_without_conversions_keeps_names_and_order() -> None:
    config = architectures.tiny_config(next(row for row in architectures.ROWS if row.model_type == "llama"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = list(CheckpointNames(model, parameter_metas(model)).convert(model.named_parameters()))
    assert [(name, id(tensor)) for name, tensor in weights] == [(n, id(p)) for n, p in model.named_parameters()]
