"""Weights that every rollout worker must hold, and the proof that one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.experience import UserError


class WeightsNotLoadedError(UserError):
    """A worker samples with other weights than it was given."""


@dataclass(frozen=True)
class WeightReceipt:
    """What a worker reports about the weights it would now sample with."""

    version: int
    checksum: str
    """Of the weights that arrived last."""
    announced: str | None
    """The checksum that came with them; None if they came from the learner directly, which has it."""
    canary_logprobs: np.ndarray


@dataclass(frozen=True)
class Published:
    """The weights that every worker must hold now."""

    bundle: Any
    """Reference to a WeightBundle; None where the learner sends weights directly."""
    version: int
    canary: tuple[int, ...]
    wanted: np.ndarray
    """[len(canary) - 1] the learner's log-probs of the canary."""

    def difference(self, who: str, receipt: WeightReceipt, checksum: str | None, tolerance: float) -> float:
        """The canary's largest difference in log-probs. `checksum` is the learner's, for weights that it sent directly.

        Raises WeightsNotLoadedError unless the receipt proves that its worker (`who`) has these weights, undamaged, and
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
