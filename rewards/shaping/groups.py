"""Statistics over the samples of one prompt."""

from __future__ import annotations

import numpy as np

from rewards.shaping.references import Float64


def standardised_in_group(rewards: Float64, divide: bool = True) -> Float64:
    """(r - mean) / std over the valid samples of one group [n], ddof=0; 0 for all where they are equal or alone.

    Before a weighted sum it gives every component the same scale within a prompt. divide=False only centres.
    """
    shifted = np.asarray(rewards, dtype=np.float64) - np.mean(rewards)
    if not divide:
        return shifted
    std = float(np.std(rewards))
    # Equal rewards leave rounding errors behind, which must not be blown up to a spread of 1.
    negligible = std <= 1e-12 * max(1.0, float(np.max(np.abs(rewards))))
    return np.zeros_like(shifted) if negligible else shifted / std
