"""Weights under the names and in the shapes of the checkpoint, which transformers changes on loading.

For example, it fuses experts when it reads them. This is undone as in `save_pretrained`
(transformers.core_model_loading.revert_weight_conversion), one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from rlkit.weights.bundle import TensorMeta


class CheckpointNames:
    def __init__(self, model: Any, metas: Sequence[TensorMeta]) -> None:
        """`metas`: metadata of the model's parameters, in the order in which they will come."""
        self._model = model
        renamings, converters = _reversed(model)
        groups: dict[str, list[str]] = {}
        for meta in metas:
            target, _ = rename_source_key(meta.name, renamings, converters, reverse=True)
            groups.setdefault(target, []).append(meta.name)
        self._groups = {name: names for names in groups.values() for name in names}
        empty = ((meta.name, torch.empty(meta.shape, dtype=meta.dtype, device="meta")) for meta in metas)
        self.metas = [TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in self.convert(empty)]

    def convert(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that `metas` lists. Parameters that make up one tensor are copied until the last one has
        come."""
        waiting: dict[str, Tensor] = {}
        for name, tensor in weights:
            group = self._groups[name]
            waiting[name] = tensor if len(group) == 1 else tensor.clone()
            if all(member in waiting for member in group):
                converted = revert_weight_conversion(self._model, {member: waiting.pop(member) for member in group})
                for target, result in converted.items():
                    yield target, result if result is tensor else result.contiguous()


def _reversed(model: Any) -> tuple[list[Any], list[Any]]:
    """Renamings and converters from the model's names to the checkpoint's, as in `revert_weight_conversion`."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        every = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in every if not isinstance(conversion, PrefixChange)]
    transforms = [conversion.reverse_transform() for conversion in conversions[::-1]]
    return (
        [transform for transform in transforms if isinstance(transform, WeightRenaming)],
        [transform for transform in transforms if isinstance(transform, WeightConverter)],
    )
