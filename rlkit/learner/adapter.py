"""peft's low-rank adapters (LoRA, arXiv 2106.09685) in a policy: W x + scale * B A x; only A and B are trained.

Everything that leaves the learner uses plain names: weights are merged into copies, never in place, so that they do not
drift. Only the adapter itself uses the names of peft's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.config.lora import ALL_LINEAR, AdapterConfig
from rlkit.learner.engine import full_shape
from rlkit.learner.frozen import move_frozen
from rlkit.models.forward import ModelLoadError, PackedCausalLM
from rlkit.weights.bundle import TensorMeta
from rlkit.weights.tensor_file import WrittenFile, write_tensors

NAME = "default"
"""peft's name for a model's only adapter."""
WRAPPED, FACTORS = ".base_layer.", (f".lora_A.{NAME}.", f".lora_B.{NAME}.")
PREFIX, FILE = "base_model.model.", "adapter_model.safetensors"
"""Name prefix and file name that peft uses."""


def add_adapter(model: nn.Module, lora: AdapterConfig) -> None:
    """Add an adapter that changes nothing yet (B is 0) to the model, and freeze everything else.

    Raises ModelLoadError if a target is not a linear layer.
    """
    import peft
    from peft.tuners.lora.layer import Linear

    targets = lora.target_modules if lora.target_modules == ALL_LINEAR else list(lora.target_modules)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.scale * lora.rank, target_modules=targets, lora_dropout=0.0)
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ModelLoadError(f"model.lora.target_modules: {error}") from error
    others = sorted({type(layer.base_layer).__name__ for layer in _layers(model) if type(layer) is not Linear})
    if others:
        raise ModelLoadError(f"model.lora.target_modules names {', '.join(others)}; adapters are for linear layers")


def _layers(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if hasattr(layer, "lora_A"))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Make the model exactly the one before training, bit for bit."""
    layers = list(_layers(model))
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch also takes `requires_grad` from the adapter
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class WithoutAdapter(PackedCausalLM):
    """An engine's model with its adapter off: a reference policy that needs no extra memory."""

    def __init__(self, engine: Any) -> None:
        nn.Module.__init__(self)
        self._engine = [engine]  # not a submodule: the model stays the engine's

    def forward(self, *inputs: Any) -> Any:
        (engine,) = self._engine
        with adapter_off(engine.module):
            return engine(*inputs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that are not trained; none with ZeRO 3, which partitions them over the ranks permanently."""
        (engine,) = self._engine
        partitioned = engine.zero_optimization_stage() == 3
        return (p for p in engine.module.parameters() if not (p.requires_grad or partitioned))

    def to(self, device: str) -> WithoutAdapter:  # type: ignore[override]
        move_frozen(self, device)
        return self


def plain_name(name: str) -> str:
    """The parameter's name without adapters."""
    return name.replace(WRAPPED, ".")


def is_factor(name: str) -> bool:
    """Whether a parameter is a factor of an adapter."""
    return any(part in name for part in FACTORS)


def adapted_weights(model: nn.Module) -> dict[str, Any]:
    """Plain name of a weight -> the layer that adapts it."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def merged(layer: Any, weight: Tensor, *, partitioned: bool) -> Tensor:
    """Return W + scale * B A, computed in fp32, in the weight's precision. `partitioned`: by ZeRO 3; all ranks call
    it."""
    import deepspeed

    factors = [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(factors, enabled=partitioned):
        a, b = (factor.float() for factor in factors)
        change = (b @ a) * layer.scaling[NAME]
        return (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)


def adapter_metas(model: nn.Module) -> list[TensorMeta]:
    """Metadata of the tensors that `adapter_tensors` yields."""
    return [TensorMeta(_in_file(name), p.dtype, full_shape(p)) for name, p in _factors(model)]


def adapter_tensors(model: nn.Module, *, partitioned: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in peft's files, full tensor). All ranks iterate; copy what must outlive the iteration."""
    import deepspeed

    for name, parameter in _factors(model):
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            yield _in_file(name), parameter.detach()


def _factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if is_factor(name))


def _in_file(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")


def save_adapter(model: Any, base: str, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> WrittenFile:
    """Write a folder that `peft.PeftModel.from_pretrained` can load; `base`: the model it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.task_type = base, "CAUSAL_LM"
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    return write_tensors(folder / FILE, adapter_metas(model), tensors)
