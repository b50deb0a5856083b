"""Copies weights straight to where vLLM's own reload would put them, on CPUs.

The reload builds every layer again: memory, loaders, packing, and a copy into the old layer. But what goes where is the
same for every version. So one reload is watched, and its copies are repeated from then on. A plan is used only if it
gives the same result as the reload to the last bit, for other weights too. Quantised models, derived values and
converted checkpoints have no such plan, and are reloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from rlkit.weights.bundle import TensorMeta, WeightDigest

Weights = Sequence[tuple[str, Tensor]]
PROBES = 3
"""Number of input rows with which a packed layer is tried, as its weights cannot be read."""
PLAIN = UnquantizedLinearMethod, UnquantizedEmbeddingMethod
MOST_BYTES = 2**27
"""Most bytes of weights. Larger models gain little per step, and would be in memory twice while a shortcut is tried."""


class NoShortcut(Exception):
    """Raised if vLLM's reload does more than copy."""


@dataclass(frozen=True)
class _View:
    """A part of a contiguous tensor, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, int(tensor.storage_offset()) + self.offset)


@dataclass
class _Target:
    """A parameter of a layer; those that vLLM packs are empty between loads."""

    layer: Any
    name: str
    shape: tuple[int, ...]
    copies: list[tuple[_View, str, _View]] = field(default_factory=list)
    """(part of the parameter, name of a weight, part of that weight)."""

    @property
    def packed(self) -> bool:
        return not getattr(self.layer, self.name).numel()


class Shortcut:
    """Has a `load_weights` like a model."""

    def __init__(self, metas: Sequence[TensorMeta], targets: Sequence[_Target], model: nn.Module, dtype: Any) -> None:
        self.metas, self.targets = metas, targets
        self.attention: list[Any] = [layer for layer in model.modules() if is_deferred_attention_layer(layer)]
        self.dtype = dtype
        self.scratch = torch.empty(max((_elements(t.shape) for t in targets if t.packed), default=0), dtype=dtype)

    def fits(self, weights: Weights) -> bool:
        return _metas(weights) == self.metas

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        arrived = dict(weights)
        for target in self.targets:
            layer = target.layer
            if target.packed:
                room = self.scratch[: _elements(target.shape)].view(target.shape)
                layer.register_parameter(target.name, nn.Parameter(room, requires_grad=False))
            parameter = getattr(layer, target.name).data
            for part, name, source in target.copies:
                part.of(parameter).copy_(source.of(arrived[name]))
            if hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)
        for layer in self.attention:
            layer.process_weights_after_loading(self.dtype)


def find_shortcut(worker: Any, weights: Weights, reload: Callable[[Weights], Any]) -> Shortcut | None:
    """Return how to load without vLLM's `reload`; None if the result would differ. Load weights afterwards.

    `worker`: vLLM's.
    """
    config, model = worker.vllm_config, worker.get_model()
    quantised = config.model_config.quantization is not None
    big = sum(tensor.nbytes for _, tensor in weights) > MOST_BYTES
    if worker.device.type != "cpu" or config.lora_config is not None or quantised or big:
        return None
    others = [(name, _another(tensor)) for name, tensor in weights]
    try:
        reload(others)
        state_of_others = _state(model)
        with _Watch(model, weights) as watch:
            reload(weights)
        shortcut = Shortcut(_metas(weights), watch.plan(), model, config.model_config.dtype)
        state = _state(model)
        shortcut.load_weights(others)
        same = _state(model) == state_of_others
        shortcut.load_weights(weights)
        return shortcut if same and _state(model) == state else None
    except NoShortcut:
        return None


def _another(tensor: Tensor) -> Tensor:
    """Return a tensor that differs in every element."""
    return (0.25 - 0.5 * tensor.float()).to(tensor.dtype) if tensor.is_floating_point() else tensor


class _Watch(TorchDispatchMode):
    """Records which copies move elements of weights to parameters."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        super().__init__()
        self.weights = sorted((tensor.data_ptr(), name, tensor) for name, tensor in weights)
        self.targets: dict[tuple[int, str], _Target] = {}
        self.owners: dict[int, tuple[nn.Module, str, Tensor]] = {}
        """Owners of tensors by memory address."""
        self._materialize = layerwise.materialize_layer
        for layer in model.modules():
            self._own(layer)

    def _own(self, layer: nn.Module) -> None:
        tensors = get_layer_tensors(layer).items()
        self.owners |= {t.untyped_storage().data_ptr(): (layer, name, t) for name, t in tensors if not t.is_meta}

    def __enter__(self) -> Any:
        def materialize(layer: nn.Module, info: Any) -> None:
            self._materialize(layer, info)
            self._own(layer)

        layerwise.materialize_layer = materialize
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        layerwise.materialize_layer = self._materialize

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and not args[0].is_meta:
            source = self._weight(args[1])
            if source is not None:
                layer, name, parameter = self.owners.get(args[0].untyped_storage().data_ptr(), (None, "", args[0]))
                key = id(layer), name
                target = self.targets.setdefault(key, _Target(layer, name, tuple(parameter.shape)))
                copy = _view(args[0], int(parameter.storage_offset())), *source
                if copy not in target.copies:
                    target.copies.append(copy)
        return func(*args, **(kwargs or {}))

    def _weight(self, tensor: Tensor) -> tuple[str, _View] | None:
        for start, name, weight in self.weights:
            if start <= tensor.data_ptr() < start + weight.nbytes and tensor.dtype == weight.dtype:
                before = (tensor.data_ptr() - start) // weight.itemsize
                return name, _view(tensor, int(tensor.storage_offset()) - before)
        return None

    def plan(self) -> list[_Target]:
        """Return the recorded copies. Raises NoShortcut if a copy goes anywhere but a plain or packed parameter."""
        for target in self.targets.values():
            if target.layer is None:
                raise NoShortcut
            held, method = getattr(target.layer, target.name), getattr(target.layer, "quant_method", None)
            packs = hasattr(target.layer, "cpu_linear") and target.name == "weight"
            if (method is not None and type(method) not in PLAIN) or not held.is_contiguous():
                raise NoShortcut
            if held.shape != target.shape and not (target.packed and packs):
                raise NoShortcut
        return list(self.targets.values())


def _view(tensor: Tensor, start: int) -> _View:
    return _View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - start)


def _metas(weights: Weights) -> list[TensorMeta]:
    return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _state(model: nn.Module) -> str:
    """Return a digest of all that the engine computes with; heads are repacked after every load (`repack_head`).

    Raises NoShortcut for a layer whose packed weights cannot be tried.
    """
    digest = WeightDigest()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.add(name, tensor.data)
    for name, layer in model.named_modules():
        linear = getattr(layer, "cpu_linear", None)
        if linear is not None and not isinstance(layer, ParallelLMHead):
            kept = layerwise.get_layerwise_info(layer).restore_metadata[0].get("weight")
            if kept is None or kept.ndim != 2 or type(layer.quant_method) not in PLAIN:
                raise NoShortcut
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(PROBES, kept.shape[-1], generator=generator).to(kept.dtype)
            digest.add(f"{name} packed", linear(probe, getattr(layer, "weight", None), None))
    return digest.hexdigest()
