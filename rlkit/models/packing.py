"""Ragged sequences as one flat row of tokens: a shared prefix goes through the model once.

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
"""Sequences shorter than this share of a bucket's longest start a new bucket, which limits the padding in attention."""
LEAST_SHARED_PREFIX = 16
"""A shorter prefix attends once per sequence: a separate piece would cost more than its repeated queries."""
KEYS_PER_TOKEN = 4
"""Attention keys that a micro-batch may hold for each token of its limit (`Tree.charged_tokens`).

Keys and values of a shared prefix are copied for each suffix. In each layer a token takes about 16 hidden sizes of
saved activations; a copied key and value take at most 2 (all heads), usually 1/4 to 1/2 (grouped heads). So four keys
per token add at most a half, usually less than an eighth.
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
        """Tokens in a packed batch: the prefix counts once."""
        return len(self.prefix) + sum(len(suffix) for suffix in self.suffixes)

    @property
    def expanded_tokens(self) -> int:
        """Tokens of all sequences: the prefix counts in each."""
        return len(self.prefix) * len(self.suffixes) + sum(len(suffix) for suffix in self.suffixes)

    @property
    def attention_tokens(self) -> int:
        """Keys that attention holds at a time: the prefix counts once for itself and once per sequence."""
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
        """Tokens that count against a micro-batch's limit: packed tokens, or attention keys / KEYS_PER_TOKEN if that is
        more."""
        return max(self.tokens, math.ceil(self.attention_tokens / KEYS_PER_TOKEN))

    def cut(self, limit: int) -> list[Tree]:
        """Split into trees of at most `limit` expanded tokens, or of a single sequence."""
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
    first, last = min(sequences), max(sequences)  # these two differ at the earliest position
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


@dataclass(frozen=True)
class Runs:
    """Concatenated pieces: each of the Q queries attends to its piece's keys (K in all) up to itself.

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
    """[T] int64: for each packed token, the index of one of its copies among the queries."""


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
    """Smallest and largest position of a row's first query."""


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
    """[T] int64: for each packed token, the index of one of its copies among the F expanded ones."""
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
    """Number of tokens in each tree's prefix and suffixes."""

    @cached_property
    def runs(self) -> Runs:
        """Attention layout without padding."""
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
        """Attention layout with padding."""
        return self._bucketed[0]

    @property
    def bucket_collapse(self) -> Tensor:
        """[T] int64: for each packed token, the index of one of its copies among the concatenated query rows of all
        buckets."""
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
        """Grids [n, L] int64 of packed indices for whole sequences, one row per sequence, short rows padded by
        repeating the last index; and, like `bucket_collapse`, [T] int64 indices into the concatenated rows."""
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
    """Lay out trees as one flat row, in the order of the trees and of their suffixes.

    Raise ValueError if there are no trees, a sequence is empty, or a suffix has no prefix token to predict it.
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
    """[N+1] int32: starts of N concatenated runs."""
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
    """[T] int64: for each packed token, the index of one of its copies among the rows of the padded grids of these
    runs."""
    collapse, offset = np.empty(tokens, dtype=np.int64), 0
    for runs in grids:
        width = max(len(run) for run in runs)
        for run in runs:
            collapse[run] = offset + np.arange(len(run))
            offset += width
    return torch.from_numpy(collapse)


def _shares(prefix: int, suffixes: Sequence[int]) -> bool:
    """Whether the prefix attends only once for all suffixes, given their lengths."""
    return prefix >= LEAST_SHARED_PREFIX and sum(length > 0 for length in suffixes) > 1


def _pieces(tree_lengths: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield packed indices of queries and of their sequence's keys up to the last query: for each whole sequence or,
    where a prefix attends once for several, for the prefix and for each suffix."""
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
    """Group similar pieces: first those that are whole sequences or prefixes, then those that follow a prefix."""
    queries, keys = [len(query) for query, _ in pieces], [len(key) for _, key in pieces]
    yield from _similar([i for i in range(len(pieces)) if queries[i] == keys[i]], keys)
    for members in _similar([i for i in range(len(pieces)) if queries[i] < keys[i]], keys):
        yield from _similar(members, queries)


def _similar(indices: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group indices by length, longest first."""
    bucket: list[int] = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
        if bucket and lengths[i] < SMALLEST_SHARE_OF_BUCKET * lengths[bucket[0]]:
            yield bucket
            bucket = []
        bucket.append(i)
    if bucket:
        yield bucket


def split_by_tokens(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Pack items into nearly equally full micro-batches of at most `limit` tokens (or one larger item).

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
