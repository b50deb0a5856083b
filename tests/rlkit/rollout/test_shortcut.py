"""Weights copied straight into an engine are those of vLLM's reload, to the last bit; else it reloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_engine import loaded_twice
from ray_fixture import ray_session  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlkit.rollout.engine import engine_environment

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
SIZES: dict[str, Any] = {
    "vocab_size": 77,  # vLLM pads it
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
Load = Callable[..., dict[str, Any]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def save_and_load(kind: Any, config: Any, dtype: torch.dtype = torch.float32, spoilt: str = "") -> dict[str, Any]:
        import ray

        torch.manual_seed(0)
        kind(config).to(dtype).save_pretrained(tmp_path)
        torch.save(dtype, tmp_path / "dtype.pt")
        task = ray.remote(num_cpus=0, runtime_env={"env_vars": engine_environment("cpu", 1)})(loaded_twice)
        result: dict[str, Any] = ray.get(task.remote(str(tmp_path), spoilt), timeout=100)
        assert result["first is vLLM's"] and result["same"] and result["reports"]
        assert result["moved"] > 0.01
        assert len(result["lacking"]) == 1 and "layers.1.mlp.down_proj 0 of 12288" in result["lacking"][0]
        return result

    return save_and_load


@pytest.mark.slow
def test_projections_that_vllm_joins_with_fewer_heads_of_keys(load: Load) -> None:
    assert load(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False))["shortcut"]


@pytest.mark.slow
def test_a_tied_head_and_biases_in_bfloat16(load: Load) -> None:
    config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    assert load(Qwen2ForCausalLM, config, torch.bfloat16)["shortcut"]


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["method", "loader"])
def test_a_quantised_layer_or_a_weight_that_changes_on_its_way_is_reloaded(load: Load, spoilt: str) -> None:
    assert not load(LlamaForCausalLM, LlamaConfig(**SIZES), spoilt=spoilt)["shortcut"]
