"""Weights in transit: a bundle for Ray's object store, or buckets of bounded size with a checksum."""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
    """CRC-32 of all data, computed by the learner."""

    @classmethod
    def pack(cls, version: int, weights: Iterable[tuple[str, Tensor]]) -> WeightBundle:
        """On CPUs the bundle holds the tensors themselves, not copies: Ray makes the one copy, in shared memory, where
        fresh memory of a process would cost several times the copying."""
        entries = []
        for name, tensor in weights:
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            entries.append(TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data))
        return cls(version, tuple(entries), _crc(entries))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) views of the data: read only."""
        for entry in self.entries:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable.*")  # Ray's shared memory; nobody writes
                flat = torch.from_numpy(entry.data)
            yield entry.name, flat.view(getattr(torch, entry.dtype)).view(entry.shape)

    def received_checksum(self) -> str:
        """CRC-32 of the data as received."""
        return _crc(self.entries)


def _crc(entries: Iterable[TensorEntry]) -> str:
    checksum = 0
    for entry in entries:
        checksum = zlib.crc32(entry.data.data, checksum)
    return f"{checksum:08x}"


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131
"""2^64 / golden ratio as a signed number: spreads the weights of neighbouring elements over all bits."""
_CHUNK = 2**22
"""Elements that are widened to 64 bits at a time."""


@dataclass(frozen=True)
class TensorMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def buckets(tensors: Sequence[TensorMeta], limit: int) -> Iterator[Sequence[TensorMeta]]:
    """Cut into runs of at most `limit` bytes, in order; a larger tensor is a run of its own.

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

    Not cryptographic: it detects loss, duplication, mix-ups and damage in transit. Order and buckets do not matter; a
    single different element always changes it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[TensorMeta, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a name that was added before."""
        if name in self._sums:
            raise ValueError(f"the weights {name} came twice")
        self._sums[name] = TensorMeta(name, tensor.dtype, tuple(tensor.shape)), _weighted_sum(tensor)

    def hexdigest(self) -> str:
        """Of all tensors so far. Waits for the device."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._sums):
            meta, total = self._sums[name]
            digest.update(f"{name} {meta.dtype} {meta.shape} {int(total.item())}\n".encode())
        return digest.hexdigest()


def _weighted_sum(tensor: Tensor) -> Tensor:
    """[] int64: elements, as integers of their size, times odd weights of their positions, modulo 2^64."""
    elements = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, elements.numel(), _CHUNK):
        part = elements[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        total += (part * ((places * _ODD) | 1)).sum()
    return total
