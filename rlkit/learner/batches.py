"""What a rank receives of a step: its micro-batches as flat arrays; no texts, no other rank's samples.

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
    """Groups, or parts of them, in one forward pass: S samples with R response tokens, group by group."""

    prompts: tuple[IntArray, ...]
    """One per group; of samples in segments also what these follow."""
    rows: tuple[tuple[int, ...], ...]
    """Response tokens of each row behind each prompt: a sample, or a segment of one."""
    sizes: tuple[int, ...]
    """Samples of each group."""
    token_ids: IntArray
    """[R] response tokens, sample after sample."""
    lengths: IntArray
    """[S]"""

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
"""A forward pass of a rank that has nothing left, but must take part in the others' collective operations."""


@dataclass(frozen=True, slots=True)
class PairRows:
    samples: NDArray[np.int64]
    """[P, 2] samples (better, worse) of the micro-batch."""
    values: Mapping[str, FloatArray]
    """[P] each."""


@dataclass(frozen=True, slots=True)
class PolicyRows:
    """[R] each, in the order of the micro-batch's response tokens, but for what says otherwise."""

    mask: BoolArray
    advantages: FloatArray
    rollout_logprobs: FloatArray | None
    """inf where no sampler made the response; None: nowhere."""
    old_logprobs: FloatArray | None
    """Under the policy before the step, where the driver has them already."""
    reference_logprobs: FloatArray | None
    """The same, under the reference policy."""
    extras: Mapping[str, FloatArray]
    samples: Mapping[str, FloatArray]
    """[S] each."""
    pairs: PairRows | None
    """Those of the micro-batch; None if the step has none."""
    watched: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Samples whose signals are recorded, by their number in the step: rows [start, end)."""


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
    """Equally many on all ranks; idle ones have no rows."""
    denominators: Denominators
    """Of all ranks."""


@dataclass(frozen=True, slots=True)
class Share(Generic[RowsT]):
    """What one rank does in a step."""

    minibatches: tuple[Minibatch[RowsT], ...]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """`Advantages.scalars`."""
    old_known: bool = False
    """All rows have `old_logprobs`."""
    reference_known: bool = False
    """All rows have `reference_logprobs`: no rank, not even an idle one, computes them."""


def on_device(rows: FloatArray | BoolArray, device: str) -> Tensor:
    """A float32 copy: arrays from Ray's object store cannot be written to."""
    return torch.from_numpy(np.array(rows, dtype=np.float32)).to(device)


@torch.no_grad()
def per_token(forward: Callable[[PackedBatch], Tensor], microbatches: Sequence[Microbatch], device: str) -> FloatArray:
    """The results of all passes in one row [R of all]. `forward`: packed batch -> [R]."""
    rows = [forward(microbatch.packed(device)).float().cpu().numpy() for microbatch in microbatches]
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.float32)
