"""Rewards relative to reference rewards: PAR (arXiv 2502.18770) and log-sigmoid centring (arXiv 2402.00742).

`references` [N] and `rewards` [n] come from the same prompt and reward model, in float64. Without a reference the
functions raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Form = Literal["sigmoid", "tanh", "arctan", "quintic"]
Fit = Literal["normal", "empirical"]

STD_FLOOR = 1e-5
"""Added to the standard deviation of the normal fit, as in PAR's code."""


def preference_as_reward(
    rewards: Float64, references: Float64, form: Form = "sigmoid", k: float = 1.0, offset: float = 0.0
) -> Float64:
    """PAR: r' = mean over references of f(k * (r - offset - r_ref)) [n].

    f: sigmoid (PAR; slow-then-fast with offset=3), tanh, arctan, or the quintic fitted to the sigmoid. A single
    reference of 0 gives the uncentred forms.
    """
    rewards, references = _float64(rewards), _known(references)
    shaped: Float64 = FORMS[form](k * (rewards[:, None] - offset - references[None, :]))
    mean: Float64 = np.asarray(shaped.mean(axis=1), dtype=np.float64)
    return mean


def centred(rewards: Float64, references: Float64) -> Float64:
    """r - mean(r_ref) [n]: PAR's baseline without a squashing function."""
    return _float64(rewards) - float(_known(references).mean())


def reference_quantile(references: Float64, quantile: float = 0.85, fit: Fit = "normal") -> float:
    """Return the `quantile` of the reference rewards.

    normal: mean + z * (std + 1e-5), ddof=1, as in PAR's code; needs two references. empirical: linear interpolation.
    """
    references = _known(references)
    if fit == "empirical":
        return float(np.quantile(references, quantile))
    if len(references) < 2:
        raise ValueError("a normal fit needs at least two reference rewards; there is one (fit=empirical takes one)")
    return float(references.mean() + NormalDist().inv_cdf(quantile) * (references.std(ddof=1) + STD_FLOOR))


def log_sigmoid(rewards: Float64) -> Float64:
    """log sigma(r) [n], without overflow."""
    return -np.logaddexp(0.0, -_float64(rewards))


def log_sigmoid_centred(rewards: Float64, reference: float, floor: float | None = None) -> Float64:
    """LSC: log sigma(r - r_ref) [n], bounded below by `floor`."""
    shaped = log_sigmoid(_float64(rewards) - reference)
    return shaped if floor is None else np.maximum(shaped, floor)


def sigmoid(x: Float64) -> Float64:
    return np.exp(log_sigmoid(x))


def quintic_sigmoid(x: Float64) -> Float64:
    """A polynomial of degree 5 fitted to the sigmoid on 100 points of [-5, 5]; 0 below -5, 1 above 5."""
    fitted = np.polyval(_quintic(), np.clip(x, -5.0, 5.0))
    return np.where(x <= -5.0, 0.0, np.where(x >= 5.0, 1.0, fitted))


@lru_cache(maxsize=1)
def _quintic() -> Float64:
    grid = np.linspace(-5.0, 5.0, 100)
    return np.polyfit(grid, sigmoid(grid), 5)


FORMS: dict[Form, Callable[[Float64], Float64]] = {
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "arctan": np.arctan,
    "quintic": quintic_sigmoid,
}


def _float64(values: Float64) -> Float64:
    return np.asarray(values, dtype=np.float64)


def _known(references: Float64) -> Float64:
    references = _float64(references)
    if references.size == 0:
        raise ValueError("there is no reference reward")
    return references
