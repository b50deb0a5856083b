"""Process rewards made safe for RL: Clip and Delta (arXiv 2410.15115). Per response, steps p [K] in order, float64."""

from __future__ import annotations

import numpy as np

from rewards.shaping.references import Float64


def clip(steps: Float64, eta: float) -> Float64:
    """r_k = min(p_k - eta, 0) [K]: further steps earn nothing, bad ones cost."""
    return np.minimum(np.asarray(steps, dtype=np.float64) - eta, 0.0)


def delta(steps: Float64) -> Float64:
    """r_k = p_k - p_{k+1} for k < K - 1, r_{K-1} = p_{K-1}, r_K = 0 [K].

    The undiscounted reward-to-go of step k < K is p_k, so repeating a step adds nothing. A single step earns 0.
    """
    steps = np.asarray(steps, dtype=np.float64)
    shaped = np.zeros_like(steps)
    shaped[:-1] = steps[:-1]
    shaped[:-2] -= steps[1:-1]
    return shaped
