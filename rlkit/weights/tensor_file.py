"""Safetensors files written and read tensor by tensor, so that this never needs a whole model in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlkit.weights.bundle import TensorMeta

CHUNK_BYTES = 2**26
"""How much is copied from a GPU, hashed and written at a time."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class WrittenFile:
    path: Path
    bytes: int
    blake2b: str
    """Hash of 16 bytes, as in checkpoints' manifests."""


def file_bytes(metas: Sequence[TensorMeta]) -> int:
    """Return the size of the file that `write_tensors` writes for these tensors."""
    return len(_header(metas)) + sum(meta.bytes for meta in metas)


def write_tensors(path: Path, metas: Sequence[TensorMeta], tensors: Iterable[tuple[str, Tensor]]) -> WrittenFile:
    """Write `tensors`, which come in the order of `metas`, from any device; hash what is written.

    Raises ValueError for a tensor other than the one announced, and the file system's OSError.
    """
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as beside:
        for piece in _pieces(metas, tensors):
            hashing = beside.submit(digest.update, piece)
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
            hashing.result()
            size += len(piece)
    return WrittenFile(path, size, digest.hexdigest())


def _pieces(metas: Sequence[TensorMeta], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[memoryview]:
    yield memoryview(_header(metas))
    arriving = iter(tensors)
    for meta in metas:
        name, tensor = next(arriving, ("nothing", torch.empty(0)))
        if TensorMeta(name, tensor.dtype, tuple(tensor.shape)) != meta:
            raise ValueError(f"expected {meta}, but {name} ({tensor.dtype}, {tuple(tensor.shape)}) arrived")
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for chunk in flat.split(CHUNK_BYTES):
            if chunk.numel():
                yield memoryview(chunk.cpu().numpy())
    for name, _ in arriving:  # this also runs a generator to its end
        raise ValueError(f"{name} arrived after the last announced tensor")


def _header(metas: Sequence[TensorMeta]) -> bytes:
    """Return length (8 bytes), JSON, padding to 8 bytes: https://huggingface.co/docs/safetensors#format."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for meta in metas:
        entries[meta.name] = {
            "dtype": TYPES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [start, start + meta.bytes],
        }
        start += meta.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor on access, and keeps none.

    The tensors are in the system's file cache, which all processes of a node share: copy before changing them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:  # opened each time: an open file keeps all its pages
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
