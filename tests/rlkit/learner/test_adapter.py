"""An adapter in the learner: what is trained, what the reference is, and what leaves the learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_fixture import need
from learner_fixture import (
    WholeLearner,
    build_learner,
    free_port,
    grpo_advantages,
    make_groups,
    smooth_steps,
    torch_optimizer,
    weights_of,
    write_tiny_model,
)
from transformers import AutoModelForCausalLM

from algorithms.base import REFERENCE
from rlkit.config.lora import AdapterConfig
from rlkit.experience import Group
from rlkit.learner.adapter import add_adapter, is_factor, merged
from rlkit.learner.engine import init_process_group, offload, reload
from rlkit.learner.frozen import move_frozen
from rlkit.learner.state import full_state, load_full_state
from rlkit.models.forward import ModelLoadError
from rlkit.models.policy import load_causal_lm

need("peft", "lora")
GROUPS = make_groups(count=4, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.1)


def adapted(model: Path, updates: int = 0, *, rank: int = 4, **options: Any) -> WholeLearner:
    torch.manual_seed(1)
    learner = smooth_steps(build_learner(model, lora=AdapterConfig(rank=rank), learning_rate=0.5, **options))
    for _ in range(updates):
        learner.update(GROUPS, grpo_advantages(GROUPS))
    return learner


def logprobs(learner: WholeLearner, which: str = "policy", groups: list[Group] = GROUPS) -> np.ndarray:
    return np.concatenate(learner.group_logprobs(groups, which))


def test_merging_adds_the_scaled_product_of_the_factors() -> None:
    """B A = [3; 4] [1 2] = [3 6; 4 8], and alpha / rank is 2 by default."""
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    init_process_group(0, 1, "127.0.0.1", free_port(), "cpu")  # DeepSpeed gathers, or not
    add_adapter(layers, AdapterConfig(rank=1, target_modules=("a",)))
    layer: Any = layers["a"]
    layer.lora_A["default"].weight.data = torch.tensor([[1.0, 2.0]])
    layer.lora_B["default"].weight.data = torch.tensor([[3.0], [4.0]])
    found = merged(layer, torch.ones(2, 2), partitioned=False)
    assert found.tolist() == [[7, 13], [9, 17]]
    assert {name: p.requires_grad for name, p in layers.named_parameters()} == {
        "a.base_layer.weight": False,
        "a.base_layer.bias": False,
        "a.lora_A.default.weight": True,
        "a.lora_B.default.weight": True,
        "b.weight": False,
        "b.bias": False,
    }


def test_an_adapter_changes_nothing_at_first_and_its_reference_never_moves(model: Path) -> None:
    learner = adapted(model)
    start = logprobs(learner)
    assert np.array_equal(start, logprobs(build_learner(model)))
    assert np.array_equal(start, logprobs(learner, REFERENCE))
    metrics = [learner.update(GROUPS, grpo_advantages(GROUPS)) for _ in range(3)]
    assert np.abs(logprobs(learner) - start).max() > 0.05
    assert np.array_equal(start, logprobs(learner, REFERENCE)), "between two updates"
    # Also within one, between the forward and the backward pass of the policy: kl is measured there.
    assert metrics[0]["kl/reference"] == 0 and metrics[2]["kl/reference"] > 1e-4


def test_only_the_adapter_is_trained(model: Path) -> None:
    learner = adapted(model)
    before = {name: p.detach().clone() for name, p in learner.engine.module.named_parameters()}
    learner.update(GROUPS, grpo_advantages(GROUPS))
    after = dict(learner.engine.module.named_parameters())
    changed = {name for name, old in before.items() if not torch.equal(old, after[name])}
    factors = {name for name in before if is_factor(name)}
    assert len(factors) == 2 * 2 * 7 and changed == {name for name in factors if "lora_B" in name}
    assert all(p.grad is None or is_factor(name) for name, p in after.items())
    held = sum(p.numel() for group in torch_optimizer(learner).param_groups for p in group["params"])
    assert held == sum(after[name].numel() for name in factors)


def test_merged_weights_have_the_adapter_s_log_probs_and_merging_drifts_nowhere(model: Path, tmp_path: Path) -> None:
    learner = adapted(model, updates=2)
    wanted, first = logprobs(learner), weights_of(learner)
    learner.save(tmp_path / "policy")
    np.testing.assert_allclose(logprobs(build_learner(tmp_path / "policy")), wanted, atol=5e-5)
    assert all(torch.equal(first[name], weight) for name, weight in weights_of(learner).items())
    assert np.array_equal(logprobs(learner), wanted), "merged into copies"


def test_peft_and_transformers_load_what_is_saved(model: Path, tmp_path: Path) -> None:
    import peft

    learner = adapted(model, updates=2)
    learner.save(tmp_path / "policy")
    (written,) = learner.save_adapter(str(model), tmp_path / "adapter")
    assert written.path.stat().st_size == written.bytes
    base = AutoModelForCausalLM.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    whole = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").named_parameters())
    for name, weight in loaded.named_parameters():
        torch.testing.assert_close(weight, whole[name], atol=1e-6, rtol=0)
    start = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert not torch.equal(start["model.layers.1.mlp.up_proj.weight"], whole["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"tokens_per_microbatch": 20},
        {"gradient_checkpointing": True, "tokens_per_microbatch": 60},
        {"zero_stage": 1},
        {"zero_stage": 2, "tokens_per_microbatch": 30},
        {"zero_stage": 3, "tokens_per_microbatch": 30},
    ],
)
def test_an_update_does_not_depend_on(model: Path, options: dict[str, Any]) -> None:
    wanted, found = (weights_of(adapted(model, updates=2, **some)) for some in ({}, options))
    start = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    moved = {name: float((weight - start[name].detach()).abs().max()) for name, weight in wanted.items()}
    assert max(moved.values()) > 1e-3
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=moved[name] * 1e-3, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_adapter_goes_on_to_the_last_bit(model: Path, stage: int) -> None:
    learner = adapted(model, updates=2, zero_stage=stage)
    state = full_state(learner.engine)
    learner.update(GROUPS, grpo_advantages(GROUPS))
    torch.manual_seed(99)  # another adapter at first
    other = smooth_steps(build_learner(model, lora=AdapterConfig(rank=4), learning_rate=0.5, zero_stage=stage))
    load_full_state(other.engine, state)
    other.set_counters({"optimizer_steps": 2, "version": 2})
    other.update(GROUPS, grpo_advantages(GROUPS))
    for one, two in zip(full_state(learner.engine).items(), full_state(other.engine).items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    with pytest.raises(ValueError, match="it belongs to another model"):
        load_full_state(adapted(model, rank=2, zero_stage=stage).engine, state)


def test_what_is_frozen_waits_in_host_memory_with_the_rest(model: Path) -> None:
    """On a CPU nothing moves; but all of the base is named, and what came back learns on."""
    learner = adapted(model, updates=1, zero_stage=1)
    assert learner.base is not None
    names = {name for name, p in learner.engine.module.named_parameters() if not p.requires_grad}
    assert len(list(learner.base.parameters())) == len(names)
    wanted = logprobs(learner)
    offload(learner.engine)
    move_frozen(learner.base, "cpu")
    reload(learner.engine)
    assert np.array_equal(logprobs(learner), wanted)
    assert not list(adapted(model, zero_stage=3).base.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("targets", "message"), [(("nothing",), "not found in the base model"), (("embed_tokens",), "for linear layers")]
)
def test_a_target_that_is_no_linear_layer_is_refused(model: Path, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        add_adapter(load_causal_lm(model, torch.float32).model, AdapterConfig(rank=2, target_modules=targets))
