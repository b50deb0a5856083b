"""The Bradley-Terry loss with what is commonly added to it, and how well scores order pairs. Pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

Array = NDArray[np.float64]
BINS = 10


def pair_losses(chosen: Tensor, rejected: Tensor, margin: Tensor, probability: Tensor, centring: float) -> Tensor:
    """Loss [N] of each pair. With d = chosen - rejected - margin, and p the probability that chosen is preferred:

        -p log sigmoid(d) - (1 - p) log sigmoid(-d) + centring (chosen + rejected)^2

    p = 1 and margin = 0 is Bradley-Terry; the margin is Llama 2's (arXiv 2307.09288), the soft label the cDPO-like
    label smoothing of Secrets of RLHF II (arXiv 2401.06080), the last term that of arXiv 2312.09244, which keeps the
    scores, whose sum the pairs leave open, around zero.
    """
    ordering = binary_cross_entropy_with_logits(chosen - rejected - margin, probability, reduction="none")
    return ordering + centring * (chosen + rejected).square()


def measures(chosen: Array, rejected: Array, probability: Array) -> dict[str, float]:
    """How scores [N] of chosen and rejected agree with the labels.

    accuracy: share of pairs ordered as labelled, ties wrong (pairs with p = 1/2 are left out); margin: mean of
    chosen - rejected; loss: cross-entropy of sigmoid(margin) against p; calibration_error: over ten bins of the
    confidence in the likelier side, mean distance between it and the share that was right, weighted by size.
    """
    margin = chosen - rejected
    decided = probability != 0.5
    right = np.where(margin == 0, False, (margin > 0) == (probability > 0.5))
    found = {
        "loss": float(np.mean(np.logaddexp(0, -margin) * probability + np.logaddexp(0, margin) * (1 - probability))),
        "margin": float(margin.mean()),
        "score_mean": float(np.concatenate([chosen, rejected]).mean()),
        "score_std": float(np.concatenate([chosen, rejected]).std()),
    }
    if decided.any():
        confidence = 1 / (1 + np.exp(-np.abs(margin[decided])))
        found["accuracy"] = float(right[decided].mean())
        found["calibration_error"] = calibration_error(confidence, right[decided].astype(np.float64))
    return found


def calibration_error(confidence: Array, right: Array) -> float:
    """Mean |confidence - share right| over ten equal bins of confidences in [1/2, 1], weighted by their sizes."""
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).sum() for b in np.unique(bins)]
    return float(sum(gaps) / len(confidence))
