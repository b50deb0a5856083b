"""`reward=implicit_prm`: the implicit process reward model, trained on outcome labels (arXiv 2412.01981)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from rlkit.reward_training.base import Report, RewardTraining, RewardTrainingConfig, Stage


class ImplicitPRMTraining(RewardTraining):
    """Trains pi_phi so that beta * log(pi_phi / pi_ref) of a response predicts its outcome."""

    class Config(RewardTrainingConfig):
        """Defaults are the published recipe's."""

        reference_path: str | None = None
        """Folder of pi_ref, which never changes; null: the same as `model_path`."""
        learning_rate: float = Field(default=5e-7, gt=0)
        """Peak learning rate of AdamW."""

    stages: ClassVar[tuple[Stage, ...]] = ("train", "evaluate")

    def run(self, report: Report) -> dict[str, Any]:
        raise NotImplementedError
