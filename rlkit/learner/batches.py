"""From scored groups to micro-batches: which samples train, on which rank, in which micro-batch, as which rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from algorithms.base import Advantages, Denominators
from rlkit.experience import Group, Sample
from rlkit.models.packing import PackedBatch, Tree, pack, split_by_tokens


@dataclass(frozen=True)
class TrainGroup:
    """The samples of a group that enter the loss, with their indices in the Experience's sample order."""

    group: Group
    samples: tuple[Sample, ...]
    indices: tuple[int, ...]

    @property
    def tree(self) -> Tree:
        return Tree(self.group.prompt.token_ids, tuple(sample.token_ids.tolist() for sample in self.samples))


@dataclass(frozen=True)
class Minibatch:
    """One optimizer step. `microbatches[rank]`: equally many on all ranks, some empty (collective operations must
    match)."""

    microbatches: tuple[tuple[tuple[TrainGroup, ...], ...], ...]
    denominators: Denominators


def train_groups(groups: Sequence[Group], advantages: Advantages) -> list[TrainGroup]:
    """The kept samples with at least one trained token; groups without any are left out."""
    chosen, first = [], 0
    for group in groups:
        kept = [
            (sample, first + i)
            for i, sample in enumerate(group.samples)
            if advantages.keep[first + i] and sample.trained.any()
        ]
        first += len(group.samples)
        if kept:
            chosen.append(TrainGroup(group, tuple(s for s, _ in kept), tuple(i for _, i in kept)))
    return chosen


def plan_minibatches(
    groups: Sequence[TrainGroup], minibatches: int, ranks: int, limit: int, *, split_groups: bool = True
) -> list[Minibatch]:
    """Split groups into minibatches (in order, equal counts), over ranks (equal tokens), into micro-batches (<= limit).

    Deterministic: every rank computes the same plan. A group above `limit` tokens is split into parts that repeat its
    prompt, unless the loss needs whole groups; what still exceeds the limit runs alone.
    """
    plan = []
    for share in np.array_split(np.arange(len(groups)), minibatches):
        chosen = [groups[i] for i in share]
        if not chosen:
            continue
        parts = [part for group in chosen for part in (_split_group(group, limit) if split_groups else [group])]
        loads = [0] * ranks
        dealt: list[list[TrainGroup]] = [[] for _ in range(ranks)]
        for part in sorted(parts, key=lambda g: -g.tree.tokens):
            rank = loads.index(min(loads))
            dealt[rank].append(part)
            loads[rank] += part.tree.tokens
        split = [split_by_tokens([g.tree.tokens for g in mine], limit) for mine in dealt]
        rounds = max(len(bins) for bins in split)
        plan.append(
            Minibatch(
                microbatches=tuple(
                    tuple(tuple(mine[i] for i in bins[r]) if r < len(bins) else () for r in range(rounds))
                    for mine, bins in zip(dealt, split, strict=True)
                ),
                denominators=Denominators(
                    tokens=float(sum(int(s.trained.sum()) for g in chosen for s in g.samples)),
                    sequences=float(sum(len(g.samples) for g in chosen)),
                    groups=float(len(chosen)),
                ),
            )
        )
    return plan


def _split_group(group: TrainGroup, limit: int) -> list[TrainGroup]:
    prompt = len(group.group.prompt.token_ids)
    sizes = [len(sample) for sample in group.samples]
    if prompt + sum(sizes) <= limit:
        return [group]
    return [
        TrainGroup(group.group, tuple(group.samples[i] for i in part), tuple(group.indices[i] for i in part))
        for part in split_by_tokens(sizes, max(1, limit - prompt))
    ]


@dataclass(frozen=True)
class Rows:
    """The response tokens of a micro-batch as flat tensors, in the order of the packed batch's targets."""

    advantages: Tensor
    """[R]"""
    rollout_logprobs: Tensor
    """[R]"""
    mask: Tensor
    """[R]"""
    sequence: Tensor
    """[R]"""
    group: Tensor
    """[S]"""
    returns: Tensor | None
    """[R]"""
    extras: dict[str, Tensor]
    """[R] each"""
    indices: tuple[int, ...]
    """Index of each sample in the Experience's order."""


def rows_of(microbatch: Sequence[TrainGroup], advantages: Advantages, device: str) -> Rows:
    samples = [sample for group in microbatch for sample in group.samples]
    indices = tuple(index for group in microbatch for index in group.indices)

    def flat(per_sample: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(per_sample).astype(np.float32)).to(device)

    lengths = torch.tensor([len(sample) for sample in samples])
    sizes = torch.tensor([len(group.samples) for group in microbatch])
    return Rows(
        advantages=flat([advantages.tokens[i] for i in indices]),
        rollout_logprobs=flat([sample.logprobs for sample in samples]),
        mask=flat([sample.trained for sample in samples]),
        sequence=torch.repeat_interleave(torch.arange(len(samples)), lengths).to(device),
        group=torch.repeat_interleave(torch.arange(len(microbatch)), sizes).to(device),
        returns=None if advantages.returns is None else flat([advantages.returns[i] for i in indices]),
        extras={name: flat([values[i] for i in indices]) for name, values in advantages.extras.items()},
        indices=indices,
    )


def per_token(
    forward: Callable[[PackedBatch], Tensor], groups: Sequence[Group], tokens_per_microbatch: int, device: str
) -> list[np.ndarray]:
    """[T] float32 for every sample of every group, in order. `forward`: packed batch -> [R]."""
    trees = [Tree(g.prompt.token_ids, tuple(s.token_ids.tolist() for s in g.samples)) for g in groups]
    pieces_of: dict[int, list[np.ndarray]] = {}
    for members in split_by_tokens([tree.tokens for tree in trees], tokens_per_microbatch):
        rows = forward(pack([trees[i] for i in members]).to(device)).float().cpu().numpy()
        lengths = [len(suffix) for i in members for suffix in trees[i].suffixes]
        pieces = iter(np.split(rows, np.cumsum(lengths)[:-1]))
        for i in members:
            pieces_of[i] = [next(pieces) for _ in trees[i].suffixes]
    return [piece for i in range(len(trees)) for piece in pieces_of[i]]
