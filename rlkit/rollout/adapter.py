"""The policy's low-rank adapter in a vLLM engine: it replaces the last one, and every request names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlkit.config.lora import ALL_LINEAR, LoraConfig, adapted_names
from rlkit.experience import UserError
from rlkit.rollout.loaded import sum_of_bits
from rlkit.weights.publication import Loaded

NAME, NUMBER = "policy", 1
SIZES = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter sizes that vLLM 0.32 supports as maximum rank (`vllm/config/lora.py`)."""
SHARED_MEMORY = Path("/dev/shm")


class EngineAdapter:
    """vLLM takes adapters as folders in peft's format; such a folder exists in memory while one is loaded."""

    def __init__(self, lora: LoraConfig) -> None:
        self.lora = lora
        self.request: Any = None
        """The adapter that requests name; None before the first one has arrived."""

    def options(self, model_path: str) -> dict[str, Any]:
        """Return the engine's options. With an adapter on the head, vLLM 0.32 could not return prompt log-probs.

        Raises UserError for a model that vLLM runs without adapters.
        """
        from vllm.model_executor.models import ModelRegistry, supports_lora

        for architecture in json.loads((Path(model_path) / "config.json").read_text()).get("architectures", ()):
            known = ModelRegistry.models.get(architecture)
            if known is not None and not supports_lora(known.load_model_cls()):
                raise UserError(f"vLLM does not support adapters for {architecture}: use model.lora.publish=merged")
        size = next(size for size in SIZES if size >= self.lora.rank)
        names = adapted_names(model_path, self.lora)
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": size, "lora_target_modules": names}

    def load(self, engine: Any, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Load an adapter between two engine steps. Returns the sum of its bits, for `adapter_report`."""
        from vllm.lora.request import LoRARequest

        tensors = dict(weights)
        config = {"r": self.lora.rank, "lora_alpha": self.lora.scale * self.lora.rank, "target_modules": ALL_LINEAR}
        root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        with TemporaryDirectory(prefix="rlkit-adapter-", dir=root) as place:
            save_file(tensors, Path(place) / "adapter_model.safetensors")
            (Path(place) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            engine.add_lora(LoRARequest(NAME, NUMBER, place, load_inplace=True))
        self.request = LoRARequest(NAME, NUMBER, NAME)  # the path is not read again
        return sum(int(sum_of_bits(tensor)) for tensor in tensors.values())


def adapter_report(manager: Any, arrived: int) -> Loaded:
    """Report on a loaded adapter from the engine's own buffers. `manager`: vLLM's LoRAModelManager."""
    slot = manager.lora_index_to_id.index(NUMBER)
    layers: Mapping[str, Any] = manager.get_adapter(NUMBER).loras
    buffers = [
        buffer[slot]
        for layer in manager.modules.values()
        for stacked in (layer.lora_a_stacked, layer.lora_b_stacked)
        for buffer in stacked
    ]
    return Loaded(
        unwritten=tuple(sorted(name for name in layers if name not in manager.modules)),
        arrived=arrived,
        held=int(torch.stack([sum_of_bits(buffer) for buffer in buffers]).sum()),
    )
