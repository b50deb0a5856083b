"""Advantages as pure functions of rewards. Groups are told apart by id, never by position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]


def group_relative(
    rewards: Float64, valid: Bool, group: Int64, *, normalize_by_std: bool, epsilon: float = 1e-6
) -> tuple[Float64, Bool]:
    """GRPO's advantage of each sample (arXiv 2402.03300 section 4.1.2): (r - mean of group) / (std of group + eps).

    rewards [B] (ignored where invalid), valid [B], group [B] ids -> advantages [B], keep [B].
    Statistics run over a group's valid samples only; std has ddof 1, as in the paper's sample estimate and in peers.
    Without `normalize_by_std` this is Dr. GRPO's (arXiv 2503.20783). Invalid samples and groups with fewer than two
    valid samples get advantage 0 and keep False; an all-equal group gets advantages 0 and is kept (its tokens count
    in the denominators, as in the published recipes).
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    keep = np.zeros(len(rewards), dtype=np.bool_)
    for g in np.unique(group):
        members = np.flatnonzero((group == g) & valid)
        if len(members) < 2:
            continue
        keep[members] = True
        centred = rewards[members] - rewards[members].mean()
        if np.ptp(rewards[members]) == 0.0:
            continue  # exactly zero, not rounding noise divided by epsilon
        advantages[members] = centred / (rewards[members].std(ddof=1) + epsilon) if normalize_by_std else centred
    return advantages, keep
