"""The critic as Ray actors: one rank, and the group of ranks that the trainer talks to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from algorithms.base import Advantages, Algorithm
from rlkit.cluster.placement import Place, anywhere
from rlkit.config.schema import RunConfig
from rlkit.config.shares import gpu_shares
from rlkit.experience import Group
from rlkit.learner.ranks import Rank, RankGroup

if TYPE_CHECKING:
    from rlkit.learner.critic import Critic


class CriticWorker(Rank):
    """One rank of the critic. Use through Ray."""

    def load(self) -> None:
        """Load the critic."""
        from rlkit.learner.critic import Critic

        config = self.config
        self.critic = Critic(
            self.model_path,
            config.critic,
            self.algorithm,
            device=config.cluster.device,
            total_steps=config.trainer.total_steps * config.critic.minibatches_per_step,
            trust_remote_code=config.model.trust_remote_code,
        )

    @property
    def trained(self) -> Critic:
        """The critic."""
        return self.critic

    def values(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """See Critic.values."""
        return self.critic.values(groups)

    def update(self, groups: Sequence[Group], advantages: Advantages, values: Sequence[np.ndarray]) -> dict[str, float]:
        """See Critic.update."""
        return self.critic.update(groups, advantages, values)


class CriticGroup(RankGroup):
    """All ranks of the critic."""

    def __init__(
        self, config: RunConfig, model_path: str, algorithm: Algorithm, logs: Path, place: Place = anywhere
    ) -> None:
        gpus = gpu_shares(config).critic
        super().__init__(CriticWorker, "critic", config.critic, config, model_path, algorithm, logs, gpus, place)

    async def values(self, groups: Any) -> list[np.ndarray]:
        """[T] of every sample."""
        values: list[np.ndarray] = await self.call("values", groups)
        return values

    async def update(self, groups: Any, advantages: Any, values: Any) -> dict[str, float]:
        """One training step of the critic."""
        metrics: dict[str, float] = await self.call("update", groups, advantages, values)
        return metrics
