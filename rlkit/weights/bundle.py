"""Weights in transit: a bundle for Ray's object store, or buckets of bounded size with a checksum."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

warnings.filterwarnings("ignore", message=".*not writable.*")  # Ray's shared memory; nothing writes to it


@dataclass(frozen=True)
class TensorEntry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class WeightBundle:
    """All weights of one policy version under their Hugging Face names."""

    version: int
    entries: tuple[TensorEntry, ...]
    checksum: str
    """A WeightDigest, computed by the learner."""

    @classmethod
    def pack(cls, version: int, weights: Iterable[tuple[str, Tensor]]) -> WeightBundle:
        """Pack the weights. On CPUs the bundle holds the tensors themselves, not copies: Ray makes the only copy, in
        shared memory; allocating process memory would cost several times as much as copying."""
        entries = []
        for name, tensor in weights:
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            entries.append(TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data))
        return cls(version, tuple(entries), _checksum(_tensors(entries)))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) views of the data: read only."""
        return _tensors(self.entries)

    def received_checksum(self) -> str:
        """Return the checksum of the data as received."""
        return _checksum(self.tensors())


def _tensors(entries: Iterable[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        yield entry.name, torch.from_numpy(entry.data).view(getattr(torch, entry.dtype)).view(entry.shape)


def _checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = WeightDigest()
    for name, tensor in tensors:
        digest.add(name, tensor)
    return digest.hexdigest()


_ROW = 1024
"""How many four-byte numbers are summed into one."""
_ROWS = 4096
"""How many such rows have intermediate products at a time."""
_ODD = -1640531527
"""2^32 / golden ratio as a signed number: spreads the weights of neighbouring positions over all bits."""


@dataclass(frozen=True)
class TensorMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def buckets(tensors: Sequence[TensorMeta], limit: int) -> Iterator[Sequence[TensorMeta]]:
    """Split tensors into runs of at most `limit` bytes, in order; a larger tensor is a run of its own.

    >>> metas = [TensorMeta(name, torch.uint8, (size,)) for name, size in [("a", 3), ("b", 4), ("c", 9), ("d", 1)]]
    >>> ["".join(meta.name for meta in run) for run in buckets(metas, 8)]
    ['ab', 'c', 'd']
    """
    start, size = 0, 0
    for i, tensor in enumerate(tensors):
        if i > start and size + tensor.bytes > limit:
            yield tensors[start:i]
            start, size = i, 0
        size += tensor.bytes
    if tensors:
        yield tensors[start:]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpack(buffer: Tensor, metas: Sequence[TensorMeta]) -> Iterator[tuple[str, Tensor]]:
    """Undo `pack`; each tensor gets its own memory, so the buffer may be reused."""
    for meta, part in zip(metas, buffer.split([meta.bytes for meta in metas]), strict=True):
        yield meta.name, part.clone().view(meta.dtype).view(meta.shape)


class WeightDigest:
    """Checksum of named tensors (names, dtypes, shapes, every bit), computed where the tensors are.

    Not cryptographic: it detects loss, duplication, mix-ups and damage in transit. It does not depend on order or
    buckets; a single different element always changes it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[TensorMeta, Sequence[Tensor]]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor. Raises ValueError for a name that was added before."""
        if name in self._sums:
            raise ValueError(f"the weights {name} arrived twice")
        self._sums[name] = TensorMeta(name, tensor.dtype, tuple(tensor.shape)), _condensed(tensor)

    def hexdigest(self) -> str:
        """Return the checksum of all tensors so far. Waits for the device."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._sums):
            meta, parts = self._sums[name]
            digest.update(f"{name} {meta.dtype} {meta.shape}\n".encode())
            for part in parts:
                digest.update(part.cpu().numpy().data)
        return digest.hexdigest()


@cache
def _weights(device: torch.device) -> Tensor:
    return (torch.arange(_ROW, dtype=torch.int32, device=device) * _ODD) | 1


def _condensed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return [rows] int32, the sum of each 1,024 four-byte numbers times odd weights by position, modulo 2^32; and
    [bytes], the unchanged rest. Without widening this takes as long as a copy on a CPU; 64 bits would take 30 times."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.data_ptr() % 4 or data.storage_offset() % 4:
        data = data.clone()  # a slice of a buffer
    whole = data.numel() // (4 * _ROW) * (4 * _ROW)
    rows = data[:whole].view(torch.int32).view(-1, _ROW)
    weights = _weights(tensor.device)
    if rows.device.type == "cpu":
        sums = rows @ weights  # CUDA has no integer matrix product
    else:
        sums = torch.cat([(part * weights).sum(1, dtype=torch.int32) for part in rows.split(_ROWS)])
    return sums, data[whole:].clone()
