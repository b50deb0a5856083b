"""The driver's plan of a step: which rank computes which samples, in which micro-batch and as which rows.

A rank here is a replica of the model: ranks that share sequences compute the same samples. The plan is made once, and
each rank is sent only its share. All ranks run the same number of passes, so that collective operations match, and
denominators cover the whole optimizer step, so that a gradient does not depend on the plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from algorithms.base import Advantages, AlgorithmNeeds, Denominators
from rlkit.config.schema import LearnerConfig
from rlkit.experience import Group, Sample
from rlkit.experience.types import FloatArray, IntArray
from rlkit.learner.batches import (
    IDLE,
    Microbatch,
    Minibatch,
    PairRows,
    PolicyRows,
    RowsT,
    Share,
    ValueRows,
)
from rlkit.models.packing import Tree, split_by_tokens


def policy_shares(
    groups: Sequence[Group],
    advantages: Advantages,
    config: LearnerConfig,
    needs: AlgorithmNeeds,
    *,
    seed: Sequence[int] = (),
    old_logprobs: Sequence[FloatArray] | None = None,
    reference_logprobs: Sequence[FloatArray] | None = None,
    watched: Collection[int] = (),
) -> tuple[list[Share[PolicyRows]], dict[str, float]]:
    """Return each rank's share of the policy update, and metrics of the plan.

    `old_logprobs`, `reference_logprobs` [T] per sample: log-probs under the policy before the step and under the
    reference; if None, ranks compute what they need. `seed`: seeds the shuffles after the first epoch. `watched`:
    samples whose signals are recorded. Raises ValueError for a layout that may separate pairs.
    """
    batch = _Batch(groups)
    kept = batch.kept(advantages)
    silent = kept & batch.silent(advantages) if needs.skips_zero_advantages and needs.layout == "any" else None
    old = old_logprobs if config.optimizer_steps > 1 else None
    pairs = _Pairs.kept(advantages, kept)
    if len(pairs.samples) and needs.layout == "any":
        raise ValueError("the advantages have pairs, but the algorithm's layout lets micro-batches separate them")

    def rows(samples: Sequence[int]) -> PolicyRows:
        ends = np.cumsum(batch.lengths[samples]).tolist()
        return PolicyRows(
            mask=np.concatenate([batch.samples[i].trained for i in samples]),
            advantages=_joined(advantages.tokens, samples),
            rollout_logprobs=_sampled([batch.samples[i] for i in samples]),
            old_logprobs=None if old is None else _joined(old, samples),
            reference_logprobs=None if reference_logprobs is None else _joined(reference_logprobs, samples),
            extras={name: _joined(values, samples) for name, values in advantages.extras.items()},
            samples={name: np.asarray(values, np.float32)[samples] for name, values in advantages.samples.items()},
            pairs=pairs.within(samples),
            watched={
                i: (end - int(batch.lengths[i]), end) for i, end in zip(samples, ends, strict=True) if i in watched
            },
        )

    shares = batch.shares(kept, silent, config, needs.layout == "any", rows, pairs.samples, seed)
    metrics = {"policy/trained_samples": float(kept.sum())}
    if silent is not None:
        metrics["policy/silent_samples"] = float(silent.sum())
    old_known, reference_known = old is not None, reference_logprobs is not None
    return [
        replace(share, scalars=advantages.scalars, old_known=old_known, reference_known=reference_known)
        for share in shares
    ], metrics


def _sampled(samples: Sequence[Sample]) -> FloatArray | None:
    """The sampler's log-probs [R], inf for samples without any; None if no sample has any."""
    if all(sample.logprobs is None for sample in samples):
        return None
    rows = [np.full(len(s), np.inf, np.float32) if s.logprobs is None else s.logprobs for s in samples]
    return np.concatenate(rows).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Pairs:
    samples: NDArray[np.int64]
    """[P, 2]"""
    values: Mapping[str, FloatArray]
    """[P] each."""

    @classmethod
    def kept(cls, advantages: Advantages, kept: NDArray[np.bool_]) -> _Pairs:
        pairs = np.zeros((0, 2), np.int64) if advantages.pairs is None else advantages.pairs
        chosen = kept[pairs].all(axis=1)
        return cls(pairs[chosen], {name: values[chosen] for name, values in advantages.pair_values.items()})

    def within(self, samples: Sequence[int]) -> PairRows | None:
        if not len(self.samples):
            return None
        place = {sample: row for row, sample in enumerate(samples)}
        chosen = np.isin(self.samples, samples).all(axis=1)
        rows = np.array([[place[i] for i in pair] for pair in self.samples[chosen].tolist()], np.int64).reshape(-1, 2)
        return PairRows(rows, {name: values[chosen].astype(np.float32) for name, values in self.values.items()})


def value_shares(
    groups: Sequence[Group],
    advantages: Advantages,
    values: Sequence[FloatArray],
    config: LearnerConfig,
    *,
    seed: Sequence[int] = (),
) -> list[Share[ValueRows]]:
    """Return each rank's share of the critic update. `values` [T] per sample: those behind the advantages. `seed`:
    seeds the shuffles after the first epoch."""
    batch, returns = _Batch(groups), advantages.returns
    if returns is None:
        raise ValueError("the algorithm has a critic, but its advantages have no returns to train it with")

    def rows(samples: Sequence[int]) -> ValueRows:
        mask = np.concatenate([batch.samples[i].trained for i in samples])
        return ValueRows(mask, _joined(returns, samples), _joined(values, samples))

    return batch.shares(batch.kept(advantages), None, config, True, rows, seed=seed)


@dataclass(frozen=True)
class Passes:
    """Forward passes over all samples of a step, whose results go back to the driver."""

    microbatches: list[tuple[Microbatch, ...]]
    """Micro-batches of each rank."""
    order: list[list[int]]
    """For each rank, the samples in the order of its results."""
    lengths: NDArray[np.int64]
    """[B] response tokens."""

    def per_sample(self, results: Sequence[FloatArray]) -> list[FloatArray]:
        """Split each rank's results [R over all its passes] into [T] of each sample."""
        rows: dict[int, FloatArray] = {}
        for samples, result in zip(self.order, results, strict=True):
            ends = np.cumsum(self.lengths[samples])
            rows |= zip(samples, np.split(result, ends), strict=False)  # results of idle passes come last
        return [rows[i] for i in range(len(self.lengths))]


def passes(groups: Sequence[Group], config: LearnerConfig) -> Passes:
    batch = _Batch(groups)
    dealt = batch.deal(batch.parts(np.ones(len(batch.samples), np.bool_)), config, split=True, in_order=True)
    return Passes(
        [tuple(batch.microbatch(some) for some in of_rank) for of_rank in dealt],
        [[i for some in of_rank for part in some for i in part.samples] for of_rank in dealt],
        batch.lengths,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Samples of one group that stay together, given by their index in the step."""

    group: int
    samples: tuple[int, ...]
    tokens: int
    """Tokens to compute."""
    charge: int
    """Tokens that count towards `tokens_per_microbatch`."""


class _Batch:
    """The groups of a step."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.samples: list[Sample] = [sample for group in groups for sample in group.samples]
        self.lengths = np.array([len(sample) for sample in self.samples], dtype=np.int64)
        self.prompts: list[IntArray] = [np.array(group.prompt.token_ids, dtype=np.int32) for group in groups]
        pairs = zip(groups, self.prompts, strict=True)
        self.rows = [sample.rows(prompt) for group, prompt in pairs for sample in group.samples]
        """For each sample: the context of each of its segments, and the segment's number of tokens."""
        starts = np.cumsum([0, *(len(group.samples) for group in groups)]).tolist()
        self.members = [range(start, end) for start, end in pairwise(starts)]

    def kept(self, advantages: Advantages) -> NDArray[np.bool_]:
        """[B] samples that are in the loss: kept ones with a trained token."""
        return advantages.keep & np.array([bool(s.trained.any()) for s in self.samples], dtype=np.bool_)

    def silent(self, advantages: Advantages) -> NDArray[np.bool_]:
        """[B] samples whose advantage is 0 on every trained token."""
        rows = zip(advantages.tokens, self.samples, strict=True)
        return np.array([not row[sample.trained].any() for row, sample in rows], dtype=np.bool_)

    def parts(self, chosen: NDArray[np.bool_]) -> list[_Part]:
        """Return the chosen samples of each group; groups without any are left out."""
        parts = []
        for group, members in enumerate(self.members):
            samples = tuple(i for i in members if chosen[i])
            if samples:
                parts.append(self._part(group, samples))
        return parts

    def _part(self, group: int, samples: tuple[int, ...]) -> _Part:
        # Only the lengths matter, not the ids.
        trees = [Tree(range(len(context)), tuple(map(range, lengths))) for context, lengths in self._trees(samples)]
        return _Part(group, samples, sum(tree.tokens for tree in trees), sum(map(charge, trees)))

    def _trees(self, samples: Sequence[int]) -> list[tuple[IntArray, tuple[int, ...]]]:
        """Contexts with the lengths of the rows after them, sample after sample; adjacent rows share a context."""
        trees: list[tuple[IntArray, tuple[int, ...]]] = []
        for context, length in (row for i in samples for row in self.rows[i]):
            last, lengths = trees[-1] if trees else (None, ())
            if last is context or (last is not None and np.array_equal(last, context)):
                trees[-1] = (context, (*lengths, length))
            else:
                trees.append((context, (length,)))
        return trees

    def shares(
        self,
        kept: NDArray[np.bool_],
        silent: NDArray[np.bool_] | None,
        config: LearnerConfig,
        split: bool,
        rows: Callable[[Sequence[int]], RowsT],
        pairs: NDArray[np.int64] | None = None,
        seed: Sequence[int] = (),
    ) -> list[Share[RowsT]]:
        """Split the groups into mini-batches of equal size, in order in the first epoch and shuffled in the others;
        silent samples only count in the denominators."""
        trained = np.array([int(sample.trained.sum()) for sample in self.samples])
        of_ranks: list[list[Minibatch[RowsT]]] = [[] for _ in range(config.replicas)]
        groups = self.parts(kept)
        orders = [
            np.random.default_rng([*seed, epoch]).permutation(len(groups)) if epoch else np.arange(len(groups))
            for epoch in range(config.epochs_per_step)
        ]
        for share in [part for order in orders for part in np.array_split(order, config.minibatches_per_step)]:
            if not len(share):
                continue
            samples = [i for g in share for i in groups[g].samples]
            computed = np.zeros_like(kept)
            computed[samples] = True
            if silent is not None:
                computed &= ~silent
            denominators = Denominators(
                tokens=float(trained[samples].sum()),
                sequences=float(len(samples)),
                groups=float(len(share)),
                pairs=0.0 if pairs is None else float(np.isin(pairs, samples).all(axis=1).sum()),
                computed_tokens=None if silent is None else float(trained[computed].sum()),
            )
            for of_rank, dealt in zip(of_ranks, self.deal(self.parts(computed), config, split=split), strict=True):
                microbatches = tuple(
                    (self.microbatch(some), rows([i for part in some for i in part.samples]) if some else None)
                    for some in dealt
                )
                of_rank.append(Minibatch(microbatches, denominators))
        return [Share(tuple(minibatches)) for minibatches in of_ranks]

    def deal(
        self, parts: Sequence[_Part], config: LearnerConfig, *, split: bool, in_order: bool = False
    ) -> list[list[list[_Part]]]:
        """Deal parts to ranks (with nearly equal tokens), and each rank's parts into micro-batches: [rank][pass] ->
        parts.

        All ranks get the same number of passes, at least one; some may be empty. A part above `tokens_per_microbatch`
        is split, repeating its prompt, unless `split` is False; a part that still exceeds the limit runs alone.
        `in_order`: a rank's parts keep their order; otherwise the largest come first.
        """
        ranks, limit = config.replicas, config.tokens_per_microbatch
        if split:
            count = -(-ranks // max(1, len(parts)))  # no rank may be idle while another has several samples
            parts = [piece for part in parts for piece in self._pieces(part, count if ranks > 1 else None, limit)]
        dealt: list[list[int]] = [[] for _ in range(ranks)]
        loads = [(0, rank) for rank in range(ranks)]
        for p in sorted(range(len(parts)), key=lambda p: -parts[p].tokens):
            load, rank = loads[0]
            dealt[rank].append(p)
            heapq.heapreplace(loads, (load + parts[p].tokens, rank))
        of_ranks = []
        for of_rank in dealt:
            mine = [parts[p] for p in (sorted(of_rank) if in_order else of_rank)]
            of_ranks.append([[mine[i] for i in bins] for bins in split_by_tokens([p.charge for p in mine], limit)])
        rounds = max(1, *map(len, of_ranks))
        return [[*dealt, *([] for _ in range(rounds - len(dealt)))] for dealt in of_ranks]

    def _pieces(self, part: _Part, count: int | None, limit: int) -> list[_Part]:
        """Split a part into pieces within the limit; for several ranks, into at least `count` nearly equal ones, if
        there are as many samples."""
        fitting = self._fitting(part, limit)
        if count is None:
            return fitting
        even = even_pieces(self._sizes(part), max(count, len(fitting)))
        return [smaller for piece in even for smaller in self._fitting(self._chosen(part, piece), limit)]

    def _fitting(self, part: _Part, limit: int) -> list[_Part]:
        if part.charge <= limit:
            return [part]
        pieces = split(
            self._sizes(part), len(self.prompts[part.group]), lambda piece: self._chosen(part, piece).charge, limit
        )
        return [self._chosen(part, piece) for piece in pieces]

    def _chosen(self, part: _Part, piece: Sequence[int]) -> _Part:
        return (
            part if len(piece) == len(part.samples) else self._part(part.group, tuple(part.samples[i] for i in piece))
        )

    def _sizes(self, part: _Part) -> list[int]:
        """Tokens of each sample, excluding the group's prompt."""
        prompt = self.prompts[part.group]
        return [
            sum(length + (0 if context is prompt else len(context)) for context, length in self.rows[i])
            for i in part.samples
        ]

    def microbatch(self, parts: Sequence[_Part]) -> Microbatch:
        if not parts:
            return IDLE
        samples = [i for part in parts for i in part.samples]
        trees = [tree for part in parts for tree in self._trees(part.samples)]
        return Microbatch(
            prompts=tuple(context for context, _ in trees),
            rows=tuple(lengths for _, lengths in trees),
            sizes=tuple(len(part.samples) for part in parts),
            token_ids=np.concatenate([self.samples[i].token_ids for i in samples]).astype(np.int32, copy=False),
            lengths=self.lengths[samples].astype(np.int32),
        )


def charge(tree: Tree) -> int:
    """Tokens of a tree that count towards `tokens_per_microbatch`."""
    return tree.charged_tokens


def split_tree(tree: Tree, limit: int) -> list[list[int]]:
    """Indices of the suffixes that go through a pass together: each part is within the limit or has one suffix. Every
    part repeats the prefix."""

    def charged(part: Sequence[int]) -> int:
        return charge(Tree(tree.prefix, [tree.suffixes[i] for i in part]))

    return split(tree.lengths, len(tree.prefix), charged, limit)


def split(sizes: Sequence[int], shared: int, charged: Callable[[Sequence[int]], int], limit: int) -> list[list[int]]:
    """Indices of the items that go through a pass together: each part is within the limit or has one item. `sizes`:
    tokens excluding the `shared` ones, which each part repeats; `charged`: tokens of a part that count towards the
    limit."""

    def smaller(part: list[int]) -> list[list[int]]:
        if charged(part) <= limit or len(part) == 1:
            return [part]
        of_part = [sizes[i] for i in part]
        pieces = split_by_tokens(of_part, max(1, limit - shared))
        if len(pieces) == 1:
            pieces = even_pieces(of_part, 2)
        return [least for piece in pieces for least in smaller([part[i] for i in piece])]

    return smaller(list(range(len(sizes))))


def even_pieces(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Split the indices into `count` pieces of nearly equal size (at most one piece per index)."""
    pieces: list[list[int]] = [[] for _ in range(min(count, len(sizes)))]
    loads = [(0, p) for p in range(len(pieces))]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, p = loads[0]
        pieces[p].append(i)
        heapq.heapreplace(loads, (load + sizes[i] + 1, p))  # + 1: no piece stays empty
    return [sorted(piece) for piece in pieces]


def _joined(rows: Sequence[FloatArray], samples: Sequence[int]) -> FloatArray:
    return np.concatenate([rows[i] for i in samples]).astype(np.float32, copy=False)
