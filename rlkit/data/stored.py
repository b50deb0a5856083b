"""Data that need not fit into memory: long sequences are kept in a temporary file."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from rlkit.data.base import DataError

T = TypeVar("T")

IN_MEMORY_BYTES = 2**28
"""Pickled size above which a sequence goes to a file."""
FOLDER = os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())
"""/tmp is often in memory; /var/tmp is for large files. Read at import, because Ray, which starts while data are read,
gets a TMPDIR of its own through this process's environment."""
_SAMPLED = 64
"""One in this many items is pickled to estimate their size."""


class Filed(Sequence[T]):
    """Items in an unnamed file, which disappears with the process. Reading needs no lock."""

    def __init__(self, file: IO[bytes], ends: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        self._file, self._ends, self._sizes = file, ends, sizes

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        size = int(self._sizes[i])
        return pickle.loads(os.pread(self._file.fileno(), size, int(self._ends[i]) - size))

    def at(self, index: Sequence[int] | NDArray[np.int64]) -> Filed[T]:
        chosen = np.asarray(index, np.int64)
        return Filed(self._file, self._ends[chosen], self._sizes[chosen])


def stored(items: Iterable[T]) -> Sequence[T]:
    """Return a list, or a `Filed` if it is larger than IN_MEMORY_BYTES. Raises DataError if the disk is full."""
    source, kept, size = iter(items), list[T](), 0
    for item in source:
        if len(kept) % _SAMPLED == 0:
            size += _SAMPLED * len(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        kept.append(item)
        if size > IN_MEMORY_BYTES:
            kept.reverse()
            return _write(chain(_emptied(kept), source))
    return kept


def picked(items: Sequence[T], index: Sequence[int] | NDArray[np.int64]) -> Sequence[T]:
    return items.at(index) if isinstance(items, Filed) else [items[i] for i in index]


def _emptied(reverse: list[T]) -> Iterator[T]:
    while reverse:
        yield reverse.pop()


def _write(items: Iterator[T]) -> Filed[T]:
    with _named():
        file = tempfile.TemporaryFile(dir=FOLDER)  # noqa: SIM115 - open as long as the sequence lives

    def size(item: T) -> int:
        with _named():
            return file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))

    sizes = np.fromiter(map(size, items), np.int64)
    with _named():
        file.flush()
    return Filed(file, np.cumsum(sizes), sizes)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the data are large, and a temporary file in {FOLDER} cannot hold them ({error}): name a folder with room "
            "in the environment variable TMPDIR."
        ) from error
