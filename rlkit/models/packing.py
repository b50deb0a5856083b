"""Ragged sequences as one flat row of tokens: a shared prefix passes the model once.

>>> batch = pack([Tree(prefix=(5, 6), suffixes=((7,), (8, 9)))])
>>> batch.token_ids.tolist(), batch.position_ids.tolist()
([5, 6, 7, 8, 9], [0, 1, 2, 2, 3])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

SMALLEST_SHARE_OF_BUCKET = 0.75
"""Sequences shorter than this share of a bucket's longest open a new one: bounds the attention's padding."""
LEAST_SHARED_PREFIX = 16
"""A shorter prefix attends once per sequence: a piece of its own would cost more than its repeated queries."""
KEYS_PER_TOKEN = 4
"""Attention keys that a micro-batch may hold for each token of its limit (`Tree.charged_tokens`).

Keys and values of a shared prefix are copied for each suffix. A token costs a layer about 16 hidden sizes of kept
activations, a copied key and value at most 2 (all heads) and mostly 1/4 to 1/2 (grouped heads): four keys for each
token add at most a half, mostly less than an eighth.
"""


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

    @property
    def attention_tokens(self) -> int:
        """Keys that attention holds at once: the prefix counts for itself and in each sequence."""
        prefix = len(self.prefix)
        if not _shares(prefix, self.lengths):
            return self.expanded_tokens
        return prefix + sum(prefix + length for length in self.lengths if length)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each suffix."""
        return tuple(len(suffix) for suffix in self.suffixes)

    @property
    def charged_tokens(self) -> int:
        """What counts against a micro-batch's limit: packed tokens, or attention's keys / KEYS_PER_TOKEN if more."""
        return max(self.tokens, math.ceil(self.attention_tokens / KEYS_PER_TOKEN))

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
class Runs:
    """Pieces in a row: Q queries of which each attends to those of its piece's keys (K in all) up to itself.

    The last query of a piece is its last key.
    """

    queries: Tensor
    """[Q] int64: packed index."""
    keys: Tensor
    """[K] int64: packed index."""
    cu_queries: Tensor
    """[P+1] int32: starts of the pieces in the queries."""
    cu_keys: Tensor
    """[P+1] int32"""
    longest_query: int
    longest_key: int
    collapse: Tensor
    """[T] int64: index of one of each packed token's copies among the queries."""


@dataclass(frozen=True)
class Bucket:
    """n pieces of similar lengths. Key j of a row is the token at position j of its sequence."""

    queries: Tensor
    """[n, L] int64: packed index; short rows are padded by repeating the last."""
    keys: Tensor
    """[n, S] int64: packed index; short rows are padded by repeating the last."""
    positions: Tensor
    """[n, L] int64: position of each query in its sequence."""
    starts: tuple[int, int]
    """Least and greatest position of a row's first query."""


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
    tree_lengths: tuple[tuple[int, tuple[int, ...]], ...]
    """Tokens of each tree's prefix and of its suffixes."""

    @cached_property
    def runs(self) -> Runs:
        """What attends to what, where attention needs no padding."""
        pieces = list(_pieces(self.tree_lengths))
        queries, keys = [query for query, _ in pieces], [key for _, key in pieces]
        device = self.token_ids.device
        return Runs(
            queries=torch.from_numpy(np.concatenate(queries)).to(device),
            keys=torch.from_numpy(np.concatenate(keys)).to(device),
            cu_queries=_starts(queries).to(device),
            cu_keys=_starts(keys).to(device),
            longest_query=max(map(len, queries)),
            longest_key=max(map(len, keys)),
            collapse=_collapse(np.concatenate(queries), len(self.token_ids)).to(device),
        )

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """What attends to what, padded."""
        return self._bucketed[0]

    @property
    def bucket_collapse(self) -> Tensor:
        """[T] int64: index of one of each packed token's copies among the concatenated query rows of all buckets."""
        return self._bucketed[1]

    @cached_property
    def _bucketed(self) -> tuple[tuple[Bucket, ...], Tensor]:
        pieces = list(_pieces(self.tree_lengths))
        device = self.token_ids.device
        buckets, members = [], list(_similar_pieces(pieces))
        for some in members:
            queries, keys = (_grid([pieces[i][side] for i in some]).to(device) for side in (0, 1))
            starts = [len(key) - len(query) for query, key in (pieces[i] for i in some)]
            buckets.append(Bucket(queries, keys, self.position_ids[queries], (min(starts), max(starts))))
        collapse = _grid_collapse([[pieces[i][0] for i in some] for some in members], len(self.token_ids))
        return tuple(buckets), collapse.to(device)

    @cached_property
    def sequence_grids(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Whole sequences: grids [n, L] int64 of packed indices, a row per sequence, short rows padded by repeating the
        last. Also, like `bucket_collapse`, [T] int64 indices into the concatenated rows."""
        sequences = np.split(self.expand.cpu().numpy(), np.cumsum(self.lengths)[:-1])
        members = [[sequences[i] for i in some] for some in _similar(range(len(sequences)), self.lengths)]
        device = self.token_ids.device
        grids = tuple(_grid(some).to(device) for some in members)
        return grids, _grid_collapse(members, len(self.token_ids)).to(device)

    def to(self, device: torch.device | str) -> PackedBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return PackedBatch(**{**values, **moved})


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
    expand = np.concatenate(sequences)
    return PackedBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        expand=torch.from_numpy(expand),
        collapse=_collapse(expand, len(tokens)),
        cu_lengths=_starts(sequences),
        lengths=lengths,
        rows=torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)),
        targets=torch.tensor(targets, dtype=torch.int64),
        last=torch.tensor([int(sequence[-1]) for sequence in sequences], dtype=torch.int64),
        tree_lengths=tuple((len(tree.prefix), tree.lengths) for tree in trees),
    )


def _starts(runs: Sequence[np.ndarray]) -> Tensor:
    """[N+1] int32 of N runs in a row."""
    return torch.tensor([0, *np.cumsum([len(run) for run in runs])], dtype=torch.int32)


def _collapse(expanded: np.ndarray, tokens: int) -> Tensor:
    """[T] int64: the last index in `expanded` of each packed token."""
    collapse = np.empty(tokens, dtype=np.int64)
    collapse[expanded] = np.arange(len(expanded))
    return torch.from_numpy(collapse)


def _grid(runs: Sequence[np.ndarray]) -> Tensor:
    """[n, L], short rows padded by repeating the last."""
    columns = np.arange(max(len(run) for run in runs))
    return torch.from_numpy(np.stack([run[np.minimum(columns, len(run) - 1)] for run in runs]))


def _grid_collapse(grids: Sequence[Sequence[np.ndarray]], tokens: int) -> Tensor:
    """[T] int64: index of one of each packed token's copies among the rows of the padded grids of these runs."""
    collapse, offset = np.empty(tokens, dtype=np.int64), 0
    for runs in grids:
        width = max(len(run) for run in runs)
        for run in runs:
            collapse[run] = offset + np.arange(len(run))
            offset += width
    return torch.from_numpy(collapse)


def _shares(prefix: int, suffixes: Sequence[int]) -> bool:
    """Whether the prefix attends once for all suffixes. Takes lengths."""
    return prefix >= LEAST_SHARED_PREFIX and sum(length > 0 for length in suffixes) > 1


def _pieces(tree_lengths: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Packed indices of queries and of the keys of their sequence, up to the last query: of each whole sequence; or,
    where its prefix attends once for several, of the prefix and of each suffix."""
    start = 0
    for prefix, suffixes in tree_lengths:
        shared = np.arange(start, start + prefix)
        once = _shares(prefix, suffixes)
        if once:
            yield shared, shared
        start += prefix
        for length in suffixes:
            suffix = np.arange(start, start + length)
            sequence = np.concatenate([shared, suffix])
            if not once:
                yield sequence, sequence
            elif length:
                yield suffix, sequence
            start += length


def _similar_pieces(pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[list[int]]:
    """Pieces that are whole sequences or prefixes, then pieces that follow a prefix."""
    queries, keys = [len(query) for query, _ in pieces], [len(key) for _, key in pieces]
    yield from _similar([i for i in range(len(pieces)) if queries[i] == keys[i]], keys)
    for members in _similar([i for i in range(len(pieces)) if queries[i] < keys[i]], keys):
        yield from _similar(members, queries)


def _similar(indices: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group by length, the longest first."""
    bucket: list[int] = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
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
