"""Weights of a model folder read tensor by tensor, and written in shards: no more than a shard is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.polar.backends import DiscriminatorError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 4 * 2**30
PICKLED = ("pytorch_model*.bin", "model*.bin")


class WeightReader:
    """Tensors of a folder by name, from safetensors or, without running what they contain, from pickles."""

    def __init__(self, folder: Path) -> None:
        """Raises DiscriminatorError if the folder holds no weights or names one twice."""
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, Path] = {}
        self._opened: tuple[Path, Any] | None = None
        files = sorted(folder.glob("*.safetensors")) or sorted({f for p in PICKLED for f in folder.glob(p)})
        if not files:
            raise DiscriminatorError(f"{folder} holds no weights (*.safetensors, or pytorch_model*.bin)")
        for file in files:
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, "pt") as tensors:
                        names = list(tensors.keys())
                except SafetensorError as error:
                    raise DiscriminatorError(f"{file} cannot be read; is it complete? {error}") from error
            else:
                names = list(self._unpickled(file))
            for name in names:
                if name in self._where:
                    raise DiscriminatorError(f"{folder}: {name} is in {self._where[name].name} and in {file.name}")
                self._where[name] = file

    @property
    def names(self) -> list[str]:
        """All names, file after file."""
        return list(self._where)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor. Raises DiscriminatorError if there is none of that name."""
        from safetensors import safe_open

        if name not in self._where:
            raise DiscriminatorError(f"the weights have no {name}")
        file = self._where[name]
        tensor: Tensor
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                tensor = tensors.get_tensor(name)
        else:
            tensor = self._unpickled(file)[name]
        return tensor

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        import pickle

        import torch

        if self._opened is None or self._opened[0] != file:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise DiscriminatorError(
                    f"{file} cannot be loaded as plain tensors, and is not loaded any other way: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            self._opened = (file, loaded)
        found: dict[str, Tensor] = self._opened[1]
        return found


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors as transformers names them: one file, or shards with an index."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    held, total = 0, 0

    def flush() -> None:
        nonlocal pending, held
        shards.append(list(pending))
        save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        pending, held = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and held + size > shard_bytes:
            flush()
        pending[name] = tensor.contiguous().clone()  # views of a larger tensor cannot be saved
        held += size
        total += size
    flush()
    if len(shards) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files, 1):
        (folder / f"shard-{number}.safetensors").rename(folder / file)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
