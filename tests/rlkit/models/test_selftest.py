"""Every model runs the way in which it equals plain transformers, or is refused."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rlkit.models import forward, selftest, small
from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.forward import ModelLoadError, PackedCausalLM, hidden_states, layer_states, runs_packed
from rlkit.models.packing import Tree, pack
from rlkit.models.policy import load_causal_lm, load_scorer, load_value_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures

TREES = [Tree(tuple(range(20, 40)), ((41, 42), (43,), (44, 45, 46, 47, 48))), Tree((9, 8), ((7, 6, 5, 4),))]


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    return model


def loss_of(model: Any) -> torch.Tensor:
    logprobs, entropy = PackedCausalLM(model)(pack(TREES))
    return (logprobs * torch.linspace(-1, 2, len(logprobs))).sum() + entropy.sum()


@pytest.mark.parametrize("partitioned", [False, True], ids=["a call per length", "one call"])
def test_rows_are_the_packed_row(plain, partitioned, monkeypatch):
    monkeypatch.setattr(forward, "_is_partitioned", lambda model: partitioned)
    results = {}
    for attention in (PACKED_ATTENTION, "sdpa"):
        plain.set_attn_implementation(attention)
        assert runs_packed(plain) == (attention == PACKED_ATTENTION)
        states = layer_states(plain, pack(TREES), [0, 1, -1]).detach()
        plain.zero_grad()
        head = plain.lm_head.__class__
        plain.lm_head.__class__ = torch.nn.Linear
        loss_of(plain).backward()
        plain.lm_head.__class__ = head
        gradients = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
        results[attention] = (hidden_states(plain, pack(TREES)).detach(), states, gradients)
    for ours, theirs in zip(results["sdpa"], results[PACKED_ATTENTION], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        ("llama", PACKED_ATTENTION),
        ("gemma2", PACKED_ATTENTION),
        ("gpt_oss", PACKED_ATTENTION),
        ("deepseek_v3", PACKED_ATTENTION),
        ("cohere", PACKED_ATTENTION),
        ("qwen3_5_text", "sdpa"),
        ("lfm2", "sdpa"),
        ("mamba", "eager"),
    ],
)
def test_the_way_in_which_a_model_is_exact(model_type, attention):
    config = architectures.tiny_config(next(row for row in architectures.ROWS if row.model_type == model_type))
    assert selftest.choose_attention(config) == attention


def test_a_recurrent_model_gives_each_sequence_its_own_logprobs(tmp_path, caplog, monkeypatch):
    """In one packed row its state would leak from one response into the next (review A1)."""
    monkeypatch.setattr(selftest, "_chosen", {})
    torch.manual_seed(1)
    config = architectures.tiny_config(next(row for row in architectures.ROWS if row.model_type == "qwen3_5_text"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    expected = []
    for tree in TREES:
        for suffix in tree.suffixes:
            ids = torch.tensor([*tree.prefix, *suffix])
            logp = torch.log_softmax(model(ids[None], use_cache=False).logits[0].float(), dim=-1)
            expected.append(logp[len(tree.prefix) - 1 : -1].gather(1, ids[len(tree.prefix) :, None])[:, 0])
    logprobs, _ = load_causal_lm(tmp_path, torch.float32)(pack(TREES))
    torch.testing.assert_close(logprobs, torch.cat(expected), atol=2e-5, rtol=1e-4)
    assert not runs_packed(load_causal_lm(tmp_path, torch.float32).model)
    assert "runs row by row, which is slower" in caplog.text


@pytest.mark.parametrize("model_type", ["roberta", "modernbert-decoder"])
def test_a_model_with_layers_between_decoder_and_head_is_refused_by_name(model_type):
    config = architectures.tiny_config(architectures.Row(model_type))
    with pytest.raises(ModelLoadError, match=rf"model type {model_type} is refused.*differ by"):
        selftest.choose_attention(config)


def test_an_architecture_of_no_table_is_tried_before_anything_starts(tmp_path):
    from rlkit.run import _try_architecture

    config = architectures.tiny_config(architectures.Row("xlm-roberta", fields={"is_decoder": True}))
    config.save_pretrained(tmp_path)
    run: Any = SimpleNamespace(model=SimpleNamespace(path=str(tmp_path), trust_remote_code=False))
    tracker: Any = SimpleNamespace(phase=lambda text: None, warn=None)
    with pytest.raises(ModelLoadError, match="model type xlm-roberta is refused"):
        asyncio.run(_try_architecture(run, tracker))


def test_nothing_of_the_trial_is_left_behind(plain):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    selftest._chosen.clear()
    with torch.inference_mode():
        assert selftest.choose_attention(plain.config) == PACKED_ATTENTION
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrong_head_is_refused(monkeypatch):
    """What no table knows of is seen in the numbers."""
    monkeypatch.setattr(forward, "SOFT_CAPS", ())
    monkeypatch.setattr(selftest, "_chosen", {})
    config = architectures.tiny_config(next(row for row in architectures.ROWS if row.model_type == "gemma2"))
    with pytest.raises(ModelLoadError, match="gemma2 is refused"):
        selftest.choose_attention(config)


def test_the_copy_of_a_large_model_is_small():
    from transformers import CONFIG_MAPPING

    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    for config in (CONFIG_MAPPING["qwen2"](**sizes), CONFIG_MAPPING["qwen3_5_text"](), CONFIG_MAPPING["deepseek_v3"]()):

        def build(copy: Any) -> Any:
            return AutoModelForCausalLM.from_config(copy)

        copy = next(small.small_copies(config, build))
        assert build(copy).num_parameters() < 5e6
        assert copy.rope_parameters == config.rope_parameters
        if copy.model_type == "qwen3_5_text":
            assert set(copy.layer_types) == set(config.layer_types)


def test_a_classifier_is_tried_as_one(plain, tmp_path):
    plain.config.num_labels = 1
    AutoModelForSequenceClassification.from_config(plain.config).save_pretrained(tmp_path / "scorer")
    assert runs_packed(load_scorer(tmp_path / "scorer", torch.float32).model)
    assert runs_packed(load_value_model(tmp_path / "model", torch.float32).model)


def test_weights_that_are_not_numbers_are_named(plain, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"not finite, in model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(tmp_path / "model", torch.float32)


def test_missing_weights_are_named(plain, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(tmp_path / "model", torch.float32)
