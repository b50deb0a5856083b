"""From the values of several rewards for one response to one. Pure functions in float64; no rewards: ValueError."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rewards.shaping.references import Float64, log_sigmoid

Combine = Literal["sum", "product", "logical_and", "mean", "median", "min", "mean_minus_std", "mean_minus_variance"]
WEIGHTED: frozenset[Combine] = frozenset({"sum", "logical_and", "mean"})
"""Where weights mean something."""
ENSEMBLES: frozenset[Combine] = frozenset({"mean", "median", "min", "mean_minus_std", "mean_minus_variance"})
"""Where the parts are members that estimate the same (arXiv 2312.09244)."""
PESSIMISTIC: frozenset[Combine] = frozenset({"mean_minus_std", "mean_minus_variance"})
"""Where `spread_weight` means something."""


def aggregate(combine: Combine, values: Float64, weights: Float64, spread_weight: float = 1.0) -> float:
    """One number from values [K] and weights [K].

    sum: sum w r. product: prod r. logical_and: sum w log sigma(r) (arXiv 2402.00742, r being centred). mean:
    sum w r / sum w. mean_minus_std, mean_minus_variance: mean - spread_weight * std or variance (ddof=0).
    """
    if len(values) == 0:
        raise ValueError("there is nothing to combine")
    match combine:
        case "sum":
            return float(values @ weights)
        case "product":
            with np.errstate(over="ignore"):  # the caller refuses what is not finite
                return float(np.prod(values))
        case "logical_and":
            return float(log_sigmoid(values) @ weights)
        case "mean":
            return float(values @ weights / weights.sum())
        case "median":
            return float(np.median(values))
        case "min":
            return float(values.min())
        case "mean_minus_std":
            return float(values.mean() - spread_weight * values.std())
        case "mean_minus_variance":
            return float(values.mean() - spread_weight * values.var())
