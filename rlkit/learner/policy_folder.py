"""Writes a language model as a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.learner.adapter import adapted_weights, is_factor, merged, plain_name
from rlkit.learner.engine import full_shape
from rlkit.learner.weight_names import CheckpointNames
from rlkit.weights.bundle import TensorMeta, buckets
from rlkit.weights.tensor_file import WrittenFile, write_tensors

GATHERED_BYTES = 2**29
"""Bytes of full parameters that a ZeRO-3 rank holds at a time while weights are packed or saved."""

SHARD_BYTES = 5 * 2**30
"""Larger weights are written as several files with transformers' index."""


def save_policy(
    trained: Any,
    metas: Sequence[TensorMeta],
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[WrittenFile]:
    """Write the weights, which come in the order of `metas`, the config, the generation config and, if the model brings
    its own, its code; return the weights' files.

    The weights come under their names in the model and are written under those of a checkpoint. Raises ValueError,
    before anything is written, if a parameter of the architecture is missing.
    """
    from transformers.dynamic_module_utils import custom_object_save

    with torch.device("meta"):
        # Copied because transformers writes the attention's name into the configuration, which the trained model
        # shares.
        model = type(trained)._from_config(copy.deepcopy(trained.config), attn_implementation="eager")
    names = {meta.name for meta in metas}
    left = [name for name, _ in model.named_parameters() if name not in names]
    if left:
        raise ValueError(f"cannot save {folder}: no weights for {', '.join(left)}")
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(metas[0].dtype).removeprefix("torch.")
    if model._auto_class is not None:
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    checkpoint = CheckpointNames(model, metas)
    return _write_shards(folder, checkpoint.metas, checkpoint.convert(weights), shard_bytes)


def _write_shards(
    folder: Path, metas: Sequence[TensorMeta], weights: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> list[WrittenFile]:
    shards = list(buckets(metas, shard_bytes))
    if len(shards) == 1:
        return [write_tensors(folder / "model.safetensors", metas, weights)]
    files: list[WrittenFile] = []
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        places |= {meta.name: file.name for meta in shard}
        # The last shard takes all that remains, so that a generator runs to its end.
        files.append(write_tensors(file, shard, weights if i == len(shards) else _first(weights, len(shard))))
    index = {"metadata": {"total_size": sum(meta.bytes for meta in metas)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _first(weights: Iterator[tuple[str, Tensor]], count: int) -> Iterator[tuple[str, Tensor]]:
    for _ in range(count):
        yield next(weights)


def parameter_metas(module: nn.Module) -> list[TensorMeta]:
    """Metadata with full shapes, also of parameters that ZeRO 3 has partitioned. An adapter's parameters are left
    out."""
    return [TensorMeta(name, p.dtype, full_shape(p)) for name, p in _plain_parameters(module)]


def _plain_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((plain_name(name), p) for name, p in module.named_parameters() if not is_factor(name))


def gathered_parameters(
    module: nn.Module, zero_stage: int, bucket_bytes: int = GATHERED_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the model, full tensor) in the order of `parameter_metas`; all ranks iterate. An adapter is merged
    into copies.

    ZeRO-3 gathers `bucket_bytes` at a time and then frees them: copy what must outlive the iteration.
    """
    import deepspeed

    parameters, layers = dict(_plain_parameters(module)), adapted_weights(module)
    for bucket in buckets(parameter_metas(module), bucket_bytes):
        gathered = [parameters[meta.name] for meta in bucket]
        with deepspeed.zero.GatheredParameters(gathered, enabled=zero_stage == 3):
            for meta, parameter in zip(bucket, gathered, strict=True):
                layer, weight = layers.get(meta.name), parameter.detach()
                yield meta.name, weight if layer is None else merged(layer, weight, partitioned=zero_stage == 3)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the weights (such as the router bias of some mixtures of experts)."""
    saved = module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def with_buffers(
    module: nn.Module, metas: Sequence[TensorMeta], weights: Iterable[tuple[str, Tensor]]
) -> tuple[list[TensorMeta], Iterator[tuple[str, Tensor]]]:
    """Return the second and third argument of `save_policy`, with the module's persistent buffers added."""
    buffers = [TensorMeta(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in persistent_buffers(module)]
    return [*metas, *buffers], chain(weights, persistent_buffers(module))
