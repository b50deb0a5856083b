"""Precision and modes: what is fp32 in bf16 training, dropout, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import (
    VOCABULARY,
    WholeCritic,
    build_learner,
    free_port,
    grpo_advantages,
    make_groups,
    torch_optimizer,
    weights_of,
    write_tiny_model,
)
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from algorithms.ppo import PPO
from rlkit.config.schema import CriticConfig, LearnerConfig
from rlkit.learner import engine as engine_module
from rlkit.learner.engine import GuardedAdamW, build_engine, init_process_group, optimizer_step
from rlkit.learner.policy import PolicyLearner

GPT2 = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=1)
PHI = PhiConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    resid_pdrop=0.1,
    embd_pdrop=0.1,
    attention_dropout=0.1,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("precision") / "model", initializer_range=0.3)


def update(learner: PolicyLearner) -> dict[str, float]:
    groups = make_groups()
    return learner.update(groups, grpo_advantages(groups))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "config"), [(GPT2LMHeadModel, GPT2), (PhiForCausalLM, PHI)])
def test_dropout_is_never_active(tmp_path: Path, kind: Any, config: Any, checkpointing: bool) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path)
    learner = build_learner(tmp_path, gradient_checkpointing=checkpointing, tokens_per_microbatch=40)
    metrics = update(learner)
    one, other = (learner.canary_logprobs([tuple(range(3, 20))]) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    # Nor in the update: the policy of its forward pass is the one that log-probs are asked of.
    again = build_learner(tmp_path, tokens_per_microbatch=40)
    assert update(again)["policy/grad_norm"] == pytest.approx(metrics["policy/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_gradient_checkpointing_computes_each_layer_twice(model: Path, stage: int) -> None:
    calls = {}
    for checkpointing in (False, True):
        learner = build_learner(model, gradient_checkpointing=checkpointing, zero_stage=stage)
        seen: list[bool] = []
        for layer in learner.engine.module.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda mlp, _, layer=layer, seen=seen: seen.append(layer.training))
        learner.group_logprobs(make_groups())
        forward = len(seen)
        update(learner)
        calls[checkpointing] = len(seen) - forward
        assert not any(seen)  # a layer that asks within its forward pass hears that it does not train
    assert calls == {False: forward, True: 2 * forward}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_microbatches_add_up_in_fp32(model: Path, stage: int) -> None:
    """300 gradients of 1: in bf16 the sum would stay at 256."""
    build_learner(model)  # the process group
    module = torch.nn.Linear(4, 1, bias=False).bfloat16()
    engine = build_engine(module, LearnerConfig(dtype="bfloat16", zero_stage=stage), "cpu")
    inputs = torch.ones(1, 4, dtype=torch.bfloat16)
    done = optimizer_step(engine, [lambda: engine(inputs).sum()] * 300, 1e-3)
    assert done.grad_norm == pytest.approx(300 * 2) and not done.skipped


@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")])
def test_buckets_of_gradients_change_nothing(
    model: Path, stage: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a parameter is larger than a bucket, as an embedding may be."""
    weights = []
    for elements in (engine_module.REDUCE_BUCKET_ELEMENTS, 1000):
        monkeypatch.setattr(engine_module, "REDUCE_BUCKET_ELEMENTS", elements)
        learner = build_learner(model, zero_stage=stage, dtype=dtype, tokens_per_microbatch=40)
        update(learner)
        weights.append(weights_of(learner))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_values_are_computed_in_fp32_in_a_bf16_critic(model: Path) -> None:
    if not torch.distributed.is_initialized():
        init_process_group(0, 1, "127.0.0.1", free_port(), "cpu")
    config = CriticConfig(dtype="bfloat16", zero_stage=1, learning_rate=1e-2)
    critic = WholeCritic(model, config, PPO(PPO.Config()), device="cpu", total_steps=4)
    with torch.no_grad():
        critic.engine.module.model.score.weight.normal_()
    values = np.concatenate(critic.group_values(make_groups()))
    assert values.dtype == np.float32
    assert (torch.from_numpy(values).bfloat16().float().numpy() != values).mean() > 0.9


def test_masters_are_the_weights_that_compute(model: Path) -> None:
    """As the docs say: DeepSpeed's fp32 masters start as the bf16 rounding of the checkpoint."""
    learner = build_learner(model, dtype="bfloat16", zero_stage=1)
    masters = torch.cat([m.detach().flatten() for g in torch_optimizer(learner).param_groups for m in g["params"]])
    assert masters.dtype == torch.float32
    torch.testing.assert_close(masters, masters.bfloat16().float(), atol=0, rtol=0)
    assert {parameter.dtype for parameter in learner.engine.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_fused_adamw_is_guarded_too(model: Path, value: float) -> None:
    """What runs on CUDA; torch has a fused AdamW for CPUs as well."""
    build_learner(model)  # the process group
    weights = {}
    for fused in (False, True):
        weight = torch.nn.Parameter(torch.arange(1.0, 5.0))
        optimizer = GuardedAdamW([weight], lr=0.1, fused=fused)
        for gradient in (0.5, value):
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
        assert optimizer.skipped == (value != 1.0)
        weights[fused] = weight.detach()
    torch.testing.assert_close(weights[True], weights[False])
