"""The critic's loss. Flat rows [R] as in `algorithms.base.ValueLossInputs`."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value [R], and where clipping binds [R] (bool).

    max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2 (PPO's public code; arXiv 2005.12729):
    a value that went further than `clip` in this update gets no more gradient. clip None: (V - R)^2 / 2.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (torch.clamp(values, old_values - clip, old_values + clip) - returns) ** 2
    return torch.maximum(plain, clipped) / 2, clipped > plain
