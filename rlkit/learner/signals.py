"""What the update computes for each token of the recorded samples: kept on the ranks, joined in the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from algorithms.base import LossInputs, LossOutput
from rlkit.experience.types import FloatArray
from rlkit.tracking.tokens import Signals


class Seen(NamedTuple):
    """Signals of one micro-batch."""

    names: tuple[str, ...]
    lengths: Mapping[int, int]
    """Number of rows of each sample, in the order of the rows."""
    rows: FloatArray
    """[names, tokens of these samples] values."""


@dataclass
class Watch:
    """Signals from a rank's first pass over each watched sample."""

    _seen: list[tuple[tuple[str, ...], dict[int, int], Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def add(self, watched: Mapping[int, tuple[int, int]], inputs: LossInputs, output: LossOutput) -> None:
        """Record the signals; `watched`: samples of the micro-batch with their rows [start, end)."""
        known = {sample for _, lengths, _ in self._seen for sample in lengths}  # recorded in an earlier epoch
        fresh = {sample: rows for sample, rows in watched.items() if sample not in known}
        if not fresh:
            return
        signals = {"logprob_learner": inputs.old_logprobs, "entropy": inputs.entropy, **output.rows}
        if inputs.reference_logprobs is not None:
            signals["logprob_reference"] = inputs.reference_logprobs
        index = torch.from_numpy(np.concatenate([np.arange(*rows) for rows in fresh.values()])).to(inputs.mask.device)
        rows = torch.stack([row.detach()[index].float() for row in signals.values()])
        self._seen.append((tuple(signals), {sample: end - start for sample, (start, end) in fresh.items()}, rows))

    def seen(self) -> list[Seen]:
        """Return the signals as arrays; the GPU is only waited for here."""
        return [Seen(names, lengths, rows.cpu().numpy()) for names, lengths, rows in self._seen]


def joined(of_ranks: Iterable[Sequence[Seen]]) -> Signals:
    signals: dict[int, dict[str, FloatArray]] = {}
    for names, lengths, rows in (seen for of_rank in of_ranks for seen in of_rank):
        end = 0
        for sample, length in lengths.items():
            start, end = end, end + length
            signals[sample] = {name: row[start:end] for name, row in zip(names, rows, strict=True)}
    return signals
