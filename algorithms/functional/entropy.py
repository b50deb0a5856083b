"""The weight of an entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class AdaptiveEntropy:
    """Weight of an entropy bonus that only acts below a target entropy (Skywork-OR1, arXiv 2505.22312 section 3.2.5).

    Immutable.
    """

    value: float
    target: float
    """Nats per token."""
    step: float
    limit: float
    below: bool = False
    """Whether the last measurement was below the target."""

    @property
    def weight(self) -> float:
        return self.value if self.below else 0.0

    def adjust(self, measured: float) -> AdaptiveEntropy:
        """Move one step up if `measured` is below the target, else one down, between 0 and the limit.

        Unchanged if `measured` is not finite.
        """
        if not np.isfinite(measured):
            return self
        below = measured < self.target
        value = self.value + (self.step if below else -self.step)
        return replace(self, value=min(max(value, 0.0), self.limit), below=below)
