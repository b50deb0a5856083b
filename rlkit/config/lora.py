"""Options of low-rank adapters, and the number of parameters that they train. Without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkit.experience.section import Section
from rlkit.models.folder import linear_shapes, model_folder

ALL_LINEAR: Literal["all-linear"] = "all-linear"


class AdapterConfig(Section):
    """Train a low-rank adapter (LoRA, arXiv 2106.09685) instead of the weights: W x + alpha / rank * B A x."""

    rank: int = Field(ge=1, le=512)
    """Rows of A and columns of B. The extra `lora` (peft) must be installed."""
    alpha: float | None = Field(default=None, gt=0)
    """B A is multiplied by alpha / rank; null: twice the rank, which makes the factor 2."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    """Linear layers that get an adapter: all but the head, or those with these names ([q_proj,v_proj])."""

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank


class LoraConfig(AdapterConfig):
    """The policy's adapter."""

    publish: Literal["auto", "adapter", "merged"] = "auto"
    """What the engines get after each step: only the adapter, or all weights with the adapter merged in. Sampling from
    merged weights is faster and needs no LoRA support in vLLM, but in bfloat16 small changes are rounded away. auto:
    merged where the engines compute in float32, else the adapter."""


def adapted_layers(path: str, lora: AdapterConfig) -> dict[str, tuple[int, int]]:
    """Return layer -> (outputs, inputs), from the model's files; empty if they are not safetensors."""
    layers, targets = linear_shapes(model_folder(path)), lora.target_modules
    if isinstance(targets, str):
        return layers
    return {name: shape for name, shape in layers.items() if is_target(name, targets)}


def adapted_names(path: str, lora: AdapterConfig) -> list[str]:
    """Return the last parts of the adapted layers' names."""
    return sorted({name.rpartition(".")[2] for name in adapted_layers(path, lora) or lora.target_modules})


def is_target(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a target is the layer's whole name or the end of it, as peft reads a list."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def adapter_parameters(path: str, lora: AdapterConfig) -> int:
    return sum(lora.rank * (outputs + inputs) for outputs, inputs in adapted_layers(path, lora).values())
