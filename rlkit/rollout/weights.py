"""One version of the policy's weights as one flat buffer: a single object in Ray's store, read without copying."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class WeightBundle:
    """All weights of one policy version under their Hugging Face names."""

    version: int
    entries: tuple[TensorEntry, ...]
    data: NDArray[np.uint8]
    checksum: str
    """blake2b of `data`, made by the learner."""

    @classmethod
    def pack(cls, version: int, weights: Iterable[tuple[str, Tensor]]) -> WeightBundle:
        """Copy tensors (on any device) into one buffer, in the order given."""
        entries, pieces, start = [], [], 0
        for name, tensor in weights:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            entries.append(
                TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start, flat.nbytes)
            )
            pieces.append(flat.copy())
            start += flat.nbytes
        data = np.concatenate(pieces)
        return cls(version, tuple(entries), data, _digest(data))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs that share the buffer's memory: read only."""
        for entry in self.entries:
            raw = self.data[entry.start : entry.start + entry.bytes]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable.*")  # Ray's shared memory; nobody writes
                flat = torch.from_numpy(raw)
            yield entry.name, flat.view(getattr(torch, entry.dtype)).view(entry.shape)

    def received_checksum(self) -> str:
        """blake2b of the buffer as it arrived."""
        return _digest(self.data)


def _digest(data: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()
