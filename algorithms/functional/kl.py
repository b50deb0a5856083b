"""KL to the reference policy as a penalty in the reward, and its coefficient (numpy).

Estimators per token, d = log pi - log pi_ref (Schulman, "Approximating KL divergence", 2020): k1 = d (unbiased), k2 =
d^2 / 2 (biased, never negative), k3 = exp(-d) - 1 + d (unbiased, never negative). d is clamped to [-20, 20] in k2 and
k3 to avoid overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from algorithms.functional.advantages import Float64, Masks, Ragged

Estimator = Literal["k1", "k2", "k3"]
LARGEST_LOG_RATIO = 20.0


def token_kl(
    policy: Sequence[NDArray[np.floating]],
    reference: Sequence[NDArray[np.floating]],
    masks: Masks,
    estimator: Estimator = "k1",
) -> list[Float64]:
    """Ragged log-probs [T_i] -> ragged float64 estimates, 0 on unmarked tokens."""

    def estimate(log_ratio: Float64) -> Float64:
        if estimator == "k1":
            return log_ratio
        d = np.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        return d**2 / 2 if estimator == "k2" else np.exp(-d) - 1 + d

    return [
        estimate(np.where(mask, np.subtract(p, r, dtype=np.float64), 0.0))
        for p, r, mask in zip(policy, reference, masks, strict=True)
    ]


def penalise(rewards: Ragged, divergence: Ragged, coefficient: float) -> list[Float64]:
    return [reward - coefficient * kl for reward, kl in zip(rewards, divergence, strict=True)]


def penalise_samples(rewards: Float64, divergence: Ragged, coefficient: float) -> Float64:
    """Outcome rewards [B] minus coefficient times the sample's summed KL (arXiv 2402.14740)."""
    return rewards - coefficient * np.array([kl.sum() for kl in divergence], dtype=np.float64)


@dataclass(frozen=True)
class AdaptiveCoefficient:
    """A coefficient that steers the KL to a target (arXiv 1909.08593 section 2.2). Immutable."""

    value: float
    target: float
    """In the unit of what is measured (paper: nats per sample)."""
    horizon: float = 10_000.0
    """Samples over which an error of 20 % changes the value by about 20 %."""

    def adjust(self, measured: float, samples: int) -> AdaptiveCoefficient:
        """Return the coefficient after `samples` more samples: value (1 + clip(measured / target - 1, +-0.2) samples /
        horizon).

        Unchanged if `measured` is not finite.
        """
        if not np.isfinite(measured):
            return self
        error = float(np.clip(measured / self.target - 1.0, -0.2, 0.2))
        return replace(self, value=self.value * (1.0 + error * samples / self.horizon))
