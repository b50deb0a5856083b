"""Scores a response's steps by its token log-ratios q = log pi_phi - log pi_ref (arXiv 2412.01981), without torch.

A step's reward is the sum of `coefficient * q`. At inference, the authors' coefficient is 0.001, not training's beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from algorithms.functional.advantages import Float64

StepKind = Literal["single", "cumulative"]
Aggregate = Literal["min", "sum", "mean", "last"]


def step_scores(
    ratios: np.ndarray, spans: Sequence[tuple[int, int]], coefficient: float, kind: StepKind = "single"
) -> Float64:
    """Return [S] scores from log-ratios q [T] and the tokens [start, end) of each of S steps.

    single: d_k = coefficient * the sum of q in step k; cumulative: c_k = coefficient * the sum of q up to its end.
    """
    total = np.concatenate([[0.0], np.cumsum(ratios, dtype=np.float64)])
    ends = total[[end for _, end in spans]]
    if kind == "cumulative":
        return np.asarray(coefficient * ends)
    return np.asarray(coefficient * (ends - total[[start for start, _ in spans]]))


def aggregate(scores: Float64, how: Aggregate = "min") -> float:
    """Return one score from step scores [S]; `last` of cumulative scores equals `sum` of single ones."""
    match how:
        case "min":
            return float(scores.min())
        case "sum":
            return float(scores.sum())
        case "mean":
            return float(scores.mean())
        case "last":
            return float(scores[-1])
