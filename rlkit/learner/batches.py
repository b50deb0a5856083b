"""What a rank receives for a step: its micro-batches as flat arrays, without texts or other ranks' samples.

`dealing.py` makes them in the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms.base import Denominators
from rlkit.experience.types import BoolArray, FloatArray, IntArray
from rlkit.models.packing import PackedBatch, Tree, pack


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Groups, or parts of groups, in one forward pass: S samples with R response tokens, group by group."""

    prompts: tuple[IntArray, ...]
    """One per group; for samples made of segments, also the context of each segment."""
    rows: tuple[tuple[int, ...], ...]
    """Per prompt, the response tokens of each row after it: a row is a sample, or a segment of one."""
    sizes: tuple[int, ...]
    """Number of samples in each group."""
    token_ids: IntArray
    """[R] response tokens, sample after sample."""
    lengths: IntArray
    """[S] response tokens of each sample."""

    def packed(self, device: str) -> PackedBatch:
        ends = np.cumsum([length for lengths in self.rows for length in lengths])
        rows = iter(np.split(self.token_ids, ends[:-1]))
        trees = [
            Tree(prompt.tolist(), tuple(next(rows).tolist() for _ in lengths))
            for prompt, lengths in zip(self.prompts, self.rows, strict=True)
        ]
        return pack(trees).to(device)

    def sequence(self, device: str) -> Tensor:
        """[R] int64: the sample of each response token."""
        return _repeated(self.lengths, device)

    def group(self, device: str) -> Tensor:
        """[S] int64: the group of each sample."""
        return _repeated(np.array(self.sizes), device)


def _repeated(counts: IntArray, device: str) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device)


IDLE = Microbatch((np.zeros(1, np.int32),), ((1,),), (1,), np.zeros(1, np.int32), np.ones(1, np.int32))
"""A forward pass for a rank that has no work left but must take part in the collective operations of the others."""


@dataclass(frozen=True, slots=True)
class PairRows:
    samples: NDArray[np.int64]
    """[P, 2] samples (better, worse) of the micro-batch."""
    values: Mapping[str, FloatArray]
    """[P] each."""


@dataclass(frozen=True, slots=True)
class PolicyRows:
    """[R] each, in the order of the micro-batch's response tokens, unless stated otherwise."""

    mask: BoolArray
    advantages: FloatArray
    rollout_logprobs: FloatArray | None
    """inf where a response did not come from a sampler; None if none did."""
    old_logprobs: FloatArray | None
    """Log-probs under the policy before the step, if the driver already has them."""
    reference_logprobs: FloatArray | None
    """Log-probs under the reference policy, if the driver already has them."""
    extras: Mapping[str, FloatArray]
    samples: Mapping[str, FloatArray]
    """[S] each."""
    pairs: PairRows | None
    """The micro-batch's pairs; None if the step has none."""
    watched: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Samples whose signals are recorded, by their number in the step, with their rows [start, end)."""


@dataclass(frozen=True, slots=True)
class ValueRows:
    """[R] each, in the order of the micro-batch's response tokens."""

    mask: BoolArray
    returns: FloatArray
    old_values: FloatArray


RowsT = TypeVar("RowsT")


@dataclass(frozen=True, slots=True)
class Minibatch(Generic[RowsT]):
    """One optimizer step of one rank."""

    microbatches: tuple[tuple[Microbatch, RowsT | None], ...]
    """The same number on all ranks; idle ones have no rows."""
    denominators: Denominators
    """Totals over all ranks."""


@dataclass(frozen=True, slots=True)
class Share(Generic[RowsT]):
    """One rank's work in a step."""

    minibatches: tuple[Minibatch[RowsT], ...]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """`Advantages.scalars`."""
    old_known: bool = False
    """Whether all rows have `old_logprobs`."""
    reference_known: bool = False
    """Whether all rows have `reference_logprobs`: if so, no rank computes them, not even an idle one."""


def on_device(rows: FloatArray | BoolArray, device: str) -> Tensor:
    """Return a float32 copy: arrays from Ray's object store cannot be written to."""
    return torch.from_numpy(np.array(rows, dtype=np.float32)).to(device)


@torch.no_grad()
def per_token(forward: Callable[[PackedBatch], Tensor], microbatches: Sequence[Microbatch], device: str) -> FloatArray:
    """Concatenate the results of all passes: [R over all micro-batches]. `forward`: packed batch -> [R]."""
    rows = [forward(microbatch.packed(device)).float().cpu().numpy() for microbatch in microbatches]
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.float32)
