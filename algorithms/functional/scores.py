"""Scores of whole responses, computed from the log-probs of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from algorithms.base import FloatArray, LossInputs
from algorithms.functional import links
from algorithms.functional.advantages import Bool, Float64

if TYPE_CHECKING:
    from torch import Tensor

GUIDE, BETTER, WORSE = "guide", "better", "worse"
"""Names of passes whose log-probs reach the loss per token."""


@dataclass(frozen=True)
class Scores:
    """Scores of a micro-batch's samples from log-probs [R]."""

    inputs: LossInputs
    config: Any
    """PreferenceConfig"""

    def sums(self, rows: Tensor) -> Tensor:
        inputs = self.inputs
        return links.sample_sums(rows, inputs.mask, inputs.sequence, inputs.num_sequences)

    def ratios(self, logprobs: Tensor) -> Tensor:
        """[R] log pi - log pi_ref; log pi if there is no reference."""
        if self.config.reference == "none":
            return logprobs
        base = self.inputs.old_logprobs if self.config.reference == "old" else self.inputs.reference_logprobs
        assert base is not None
        return logprobs - base

    def of(self, logprobs: Tensor) -> Tensor:
        """[S]"""
        total = self.sums(self.ratios(logprobs))
        return total / self.lengths() if self.config.length_normalised else total

    def sides(self, logprobs: Tensor, better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
        """[P] scores of chosen and of rejected responses."""
        config, inputs, ratios = self.config, self.inputs, self.ratios(logprobs)
        if config.guide is not None:
            as_chosen, as_rejected = links.tgdpo_weights(self.guide_ratios(), config.beta, config.guide_weight)
            return self.sums(as_chosen * ratios)[better], self.sums(as_rejected * ratios)[worse]
        scores = self.of(logprobs)
        if config.ld_alpha == 1:
            return scores[better], scores[worse]
        shorter = self.lengths()[better].minimum(self.lengths()[worse]).long()
        shared = [links.first_sums(ratios, inputs.mask, inputs.sequence, side, shorter) for side in (better, worse)]
        chosen, rejected = (
            config.ld_alpha * scores[side] + (1 - config.ld_alpha) * first
            for side, first in zip((better, worse), shared, strict=True)
        )
        return chosen, rejected

    def lengths(self) -> Tensor:
        """[S] trained tokens."""
        return self.sums(self.inputs.mask)

    def mean_logprobs(self) -> Tensor:
        """[S]"""
        return self.sums(self.inputs.logprobs) / self.lengths()

    def guide_ratios(self) -> Tensor:
        """[R]"""
        assert self.inputs.reference_logprobs is not None
        return self.inputs.extras[GUIDE] - self.inputs.reference_logprobs

    def token_rewards(self) -> Tensor:
        """[R]"""
        return links.treg_rewards(self.inputs.extras[BETTER], self.inputs.extras[WORSE])


def summed(rows: Sequence[FloatArray], masks: Sequence[Bool], normalised: bool = False) -> Float64:
    """[B] sums or means over trained tokens; 0 if there are none."""
    sums = [row[mask].sum(dtype=np.float64) for row, mask in zip(rows, masks, strict=True)]
    lengths = [max(1, int(mask.sum())) if normalised else 1 for mask in masks]
    return np.array(sums, np.float64) / np.array(lengths, np.float64)
