"""Ragged sequences as one flat row of tokens: a shared prefix passes the model's linear layers once.

>>> batch = pack([Tree(prefix=(5, 6), suffixes=((7,), (8, 9)))])
>>> batch.token_ids.tolist(), batch.position_ids.tolist()
([5, 6, 7, 8, 9], [0, 1, 2, 2, 3])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

SMALLEST_SHARE_OF_BUCKET = 0.75
"""Sequences shorter than this share of a bucket's longest open a new one: bounds the attention's padding."""


@dataclass(frozen=True)
class Tree:
    """Sequence i is `prefix + suffixes[i]`."""

    prefix: Sequence[int]
    suffixes: Sequence[Sequence[int]]

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, ...]]) -> Tree:
        prefix = shared_prefix(sequences)
        return cls(prefix, tuple(ids[len(prefix) :] for ids in sequences))

    @property
    def tokens(self) -> int:
        """In a packed batch: the prefix counts once."""
        return len(self.prefix) + sum(len(suffix) for suffix in self.suffixes)

    @property
    def expanded_tokens(self) -> int:
        """Of all sequences: the prefix counts in each."""
        return len(self.prefix) * len(self.suffixes) + sum(len(suffix) for suffix in self.suffixes)

    def cut(self, limit: int) -> list[Tree]:
        """Split into trees of at most `limit` expanded tokens, or one sequence, each."""
        parts: list[list[Sequence[int]]] = [[]]
        room = limit
        for suffix in self.suffixes:
            size = len(self.prefix) + len(suffix)
            if parts[-1] and size > room:
                parts.append([])
                room = limit
            parts[-1].append(suffix)
            room -= size
        return [Tree(self.prefix, part) for part in parts]


def shared_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if not sequences:
        return ()
    first, last = min(sequences), max(sequences)  # these two differ earliest
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


@dataclass(frozen=True)
class PackedBatch:
    """T packed tokens of N sequences with F >= T tokens in all; R suffix tokens are predicted."""

    token_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[T] int64: position in the token's sequence."""
    expand: Tensor
    """[F] int64: packed index of each token of each sequence, sequence after sequence."""
    collapse: Tensor
    """[T] int64: index of one of each packed token's copies among the F expanded ones."""
    cu_lengths: Tensor
    """[N+1] int32: starts of the sequences in the F expanded tokens."""
    lengths: tuple[int, ...]
    rows: Tensor
    """[R] int64: packed index of the token whose hidden state predicts `targets[r]`."""
    targets: Tensor
    """[R] int64: suffix tokens, sequence after sequence."""
    last: Tensor
    """[N] int64: packed index of each sequence's last token."""
    buckets: tuple[Tensor, ...]
    """[n, L] int64 each, of similar lengths: indices of expanded tokens, short rows padded by repeating the last."""
    bucket_collapse: Tensor
    """[T] int64: like `collapse`, into the concatenated rows of all buckets."""

    def to(self, device: torch.device | str) -> PackedBatch:
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value = value.to(device, non_blocking=True)
            elif item.name == "buckets":
                value = tuple(bucket.to(device, non_blocking=True) for bucket in value)
            moved[item.name] = value
        return PackedBatch(**moved)


def pack(trees: Sequence[Tree]) -> PackedBatch:
    """Lay trees out as one flat row, in the order of the trees and of their suffixes.

    Raise ValueError for no tree, for an empty sequence, and for a suffix without a prefix token to predict it.
    """
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    targets: list[int] = []
    for tree in trees:
        start, width = len(tokens), len(tree.prefix)
        tokens.extend(tree.prefix)
        positions.extend(range(width))
        shared = np.arange(start, start + width)
        for suffix in tree.suffixes:
            if width + len(suffix) == 0:
                raise ValueError("cannot pack an empty sequence")
            begin = len(tokens)
            tokens.extend(suffix)
            positions.extend(range(width, width + len(suffix)))
            sequence = np.concatenate([shared, np.arange(begin, begin + len(suffix))])
            sequences.append(sequence)
            if len(suffix):
                if width == 0:
                    raise ValueError("a suffix needs at least one prefix token to be predicted from")
                rows.append(sequence[width - 1 : -1])
                targets.extend(suffix)
    if not sequences:
        raise ValueError("cannot pack zero sequences")
    lengths = tuple(len(sequence) for sequence in sequences)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    expand = np.concatenate(sequences)
    collapse = np.empty(len(tokens), dtype=np.int64)
    collapse[expand] = np.arange(len(expand))

    buckets, bucket_flat = [], np.empty(len(expand), dtype=np.int64)
    offset = 0
    for members in _buckets(lengths):
        width = max(lengths[i] for i in members)
        grid = np.empty((len(members), width), dtype=np.int64)
        for row, i in enumerate(members):
            grid[row] = starts[i] + np.minimum(np.arange(width), lengths[i] - 1)
            bucket_flat[starts[i] : starts[i + 1]] = offset + row * width + np.arange(lengths[i])
        buckets.append(torch.from_numpy(grid))
        offset += grid.size
    return PackedBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        expand=torch.from_numpy(expand),
        collapse=torch.from_numpy(collapse),
        cu_lengths=torch.from_numpy(starts.astype(np.int32)),
        lengths=lengths,
        rows=torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)),
        targets=torch.tensor(targets, dtype=torch.int64),
        last=torch.tensor([int(sequence[-1]) for sequence in sequences], dtype=torch.int64),
        buckets=tuple(buckets),
        bucket_collapse=torch.from_numpy(bucket_flat[collapse]),
    )


def _buckets(lengths: Sequence[int]) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bucket: list[int] = []
    for i in order:
        if bucket and lengths[i] < SMALLEST_SHARE_OF_BUCKET * lengths[bucket[0]]:
            yield bucket
            bucket = []
        bucket.append(i)
    if bucket:
        yield bucket


def split_by_tokens(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Pack items into micro-batches of at most `limit` tokens (or one larger item), nearly equally full.

    First-fit decreasing; indices inside a micro-batch are ascending, and micro-batches are ordered by their first item.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for b, left in enumerate(room):
            if sizes[i] <= left:
                bins[b].append(i)
                room[b] -= sizes[i]
                break
        else:
            bins.append([i])
            room.append(limit - sizes[i])
    return sorted(sorted(members) for members in bins)
