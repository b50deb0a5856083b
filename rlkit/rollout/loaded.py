"""Check loaded weights against a vLLM engine's own parameters: which were written, and the sum of their bits.

vLLM 0.32 reports a layer that got no weights, or too few, only as a line in its log, and keeps the old layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlkit.weights.publication import Loaded

NOISY_LOGGERS = ("layerwise", "inplace")
NOISE = ("Failed to load weights", "Following weights were not loaded")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LoadedWeights:
    """Stands in for a model while weights arrive, and reports on them."""

    def __init__(self, model: Any, loader: Any = None) -> None:
        """`loader`: the object that loads the weights, if not the model."""
        self.model, self.loader = model, loader or model
        self.dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        parameters = dict(model.named_parameters())
        self.readable = {name for name, parameter in parameters.items() if parameter.numel()}
        """Parameters that are not empty: on CPUs vLLM repacks linear layers and empties their parameters."""
        self.all_readable = len(self.readable) == len(parameters)
        self.arrived: dict[str, Tensor] = {}
        """Name -> sum of bits, in the engine's precision."""
        self.unwritten: tuple[str, ...] = ()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load weights; may be called several times."""
        return self.loader.load_weights(self._counted(weights))

    def _counted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if self.all_readable or name in self.readable:
                self.arrived[name] = sum_of_bits(tensor.to(self.dtype) if tensor.is_floating_point() else tensor)
            yield name, tensor

    def complete(self) -> None:
        """Note that all have arrived. Call before `finalize_layerwise_reload`, which forgets what was missing."""
        self.unwritten = tuple(unwritten_layers(self.model))

    def report(self) -> Loaded:
        """Return the report. Call after `finalize_layerwise_reload`. Waits for the device."""
        held = {name: sum_of_bits(p) for name, p in self.model.named_parameters() if name in self.readable}
        return Loaded(self.unwritten, _total(self.arrived), _total(held))


def unwritten_layers(model: Any) -> list[str]:
    """Return layers whose parameters the weights since `initialize_layerwise_reload` have not written in full.

    Excludes a head that shares a written embedding's parameter, padding of the vocabulary, and what no checkpoint
    contains, such as the tables of rotary embeddings.
    """
    written: set[int] = set()
    short = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load():  # complete, and already in place
            written.update(id(parameter) for parameter in _parameters(layer).values())
            continue
        parameters = {} if info.kernel_tensors is None else info.kernel_tensors[0]
        needed = sum(_loadable(layer, parameter) for parameter in _parameters(layer).values())
        if info.load_numel >= needed:
            written.update(id(parameter) for parameter in parameters.values())
        else:
            short.append((f"{name} {info.load_numel} of {needed}", parameters.values()))
    return [text for text, parameters in short if any(id(parameter) not in written for parameter in parameters)]


def _parameters(layer: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}


def _loadable(layer: Any, parameter: Tensor) -> int:
    size: int = getattr(parameter, "weight_loader_numel", parameter.numel())
    if isinstance(layer, VocabParallelEmbedding) and parameter.ndim and getattr(parameter, "output_dim", None) == 0:
        rows = layer.shard_indices.org_vocab_end_index - layer.shard_indices.org_vocab_start_index
        return min(size, rows * prod(parameter.shape[1:]))
    return size


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Return [] int64, the sum of the elements' bit patterns as integers: the same modulo 2^32 however they are split,
    joined, ordered or padded with zeros."""
    elements = tensor.detach().contiguous().view(-1)
    integers = elements.view(_INTEGERS[elements.element_size()])
    # Widening four bytes to eight would take a CPU 20 times as long as the sum.
    return integers.sum(dtype=torch.int32 if integers.dtype == torch.int32 else torch.int64).to(torch.int64)


def _total(sums: Mapping[str, Tensor]) -> int:
    return int(torch.stack(list(sums.values())).sum()) % 2**32 if sums else 0


class _Silence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in NOISE)


def silence_vllm() -> None:
    """Drop vLLM's log lines on layers without weights, which every healthy run has: `unwritten_layers` knows better."""
    for name in NOISY_LOGGERS:
        logging.getLogger(f"vllm.model_executor.model_loader.reload.{name}").addFilter(_Silence())
