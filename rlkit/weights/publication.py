"""Weights that every rollout worker must hold, and the proof that it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.experience import UserError


class WeightsNotLoadedError(UserError):
    """A worker samples with other weights than those published."""


@dataclass(frozen=True)
class WeightReceipt:
    """A worker's report on the weights it would now sample with."""

    version: int
    checksum: str
    """Checksum of the weights received."""
    announced: str | None
    """The checksum sent with them; None after a direct transfer, where the learner has it."""
    canary_logprobs: np.ndarray


@dataclass(frozen=True)
class Published:
    bundle: Any
    """Reference to a WeightBundle; None for a direct transfer."""
    version: int
    canary: tuple[int, ...]
    wanted: np.ndarray
    """[len(canary) - 1] the learner's log-probs of the canary."""

    def difference(self, who: str, receipt: WeightReceipt, checksum: str | None, tolerance: float) -> float:
        """Return the canary's largest difference in log-probs. `checksum`: the learner's, for a direct transfer.

        Raises WeightsNotLoadedError unless the receipt proves that worker `who` holds these weights, undamaged, and
        samples as the learner does.
        """
        sent = receipt.announced if checksum is None else checksum
        if sent not in (None, receipt.checksum):
            raise WeightsNotLoadedError(
                f"{who}: weights of version {self.version} arrived damaged: their checksum is {receipt.checksum}, the "
                f"learner's is {sent}"
            )
        if receipt.version != self.version:
            raise WeightsNotLoadedError(f"{who} has weights of version {receipt.version}, not {self.version}")
        difference = float(np.abs(receipt.canary_logprobs - self.wanted).max())
        if not difference <= tolerance:  # also true for NaN
            raise WeightsNotLoadedError(
                f"{who}: after version {self.version} was loaded, its log-probs of the canary prompt differ from the "
                f"learner's by {difference:.3g}, more than {tolerance:g} (rollout.canary_tolerance): it does not "
                "sample from the policy that is trained"
            )
        return difference
