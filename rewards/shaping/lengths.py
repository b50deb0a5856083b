"""Costs of long responses, added to outcome rewards. Lengths [n] are response tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rewards.shaping.references import Float64

Int64 = NDArray[np.int64]


def length_penalty(lengths: Int64, per_token: float, free_tokens: int) -> Float64:
    """-per_token * max(0, length - free_tokens) [n] (PAR's code, arXiv 2502.18770: 0.01 beyond 300 tokens)."""
    return -per_token * np.maximum(lengths.astype(np.float64) - free_tokens, 0.0)


def overlong_penalty(lengths: Int64, max_tokens: int, buffer_tokens: int) -> Float64:
    """DAPO's soft punishment (arXiv 2503.14476 eq. 13) [n]: 0 up to max_tokens - buffer_tokens, then down to -1."""
    over = lengths.astype(np.float64) - (max_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)
