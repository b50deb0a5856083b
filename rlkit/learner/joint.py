"""Policy and critic as the trainer sees them: one thing that gathers experience and learns from it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from algorithms.base import Advantages, Algorithm, Experience
from rlkit.cluster.placement import Placement
from rlkit.config.schema import CriticConfig, RunConfig
from rlkit.experience import Group
from rlkit.learner.actors import CriticGroup, LearnerGroup
from rlkit.learner.ranks import RankGroup


@dataclass
class JointLearner:
    algorithm: Algorithm
    policy: LearnerGroup
    critic: CriticGroup | None
    critic_config: CriticConfig

    @classmethod
    def create(
        cls,
        config: RunConfig,
        algorithm: Algorithm,
        policy_path: str,
        critic_path: str,
        logs: Path,
        placement: Placement,
    ) -> JointLearner:
        critic = None
        if algorithm.needs().critic:
            critic = CriticGroup(config, critic_path, algorithm, logs, placement.of("critic"))
        policy = LearnerGroup(config, policy_path, algorithm, logs, placement.of("learner"))
        return cls(algorithm, policy, critic, config.critic)

    async def save_state(self, folder: Path) -> dict[str, dict[str, int]]:
        """Write `learner.safetensors` and, with a critic, `critic.safetensors`; return their counters."""
        parts = self._parts()
        saved = await asyncio.gather(*(part.save_state(folder / f"{name}.safetensors") for name, part in parts.items()))
        return dict(zip(parts, saved, strict=True))

    async def load_state(self, folder: Path, counters: dict[str, dict[str, int]]) -> None:
        await asyncio.gather(
            *(part.load_state(folder / f"{name}.safetensors", counters[name]) for name, part in self._parts().items())
        )

    async def offload(self) -> None:
        await asyncio.gather(*(part.offload() for part in self._parts().values()))

    async def reload(self) -> None:
        await asyncio.gather(*(part.reload() for part in self._parts().values()))

    async def watch(self) -> None:
        """Raises RayActorError soon after a rank dies."""
        await asyncio.gather(*(part.watch() for part in self._parts().values()))

    def _parts(self) -> dict[str, RankGroup]:
        return {"learner": self.policy, **({"critic": self.critic} if self.critic is not None else {})}

    async def experience(self, groups: Sequence[Group], step: int) -> Experience:
        """The groups with the values and log-probs that the algorithm's advantages need."""
        values = await self.critic.values(groups) if self.critic is not None else None
        if not self.algorithm.needs().token_kl:
            return Experience(groups, step, values)
        policy, reference = await self.policy.logprobs(groups)
        return Experience(groups, step, values, policy, reference)

    async def update(self, experience: Experience, advantages: Advantages) -> dict[str, float]:
        """Train policy and critic side by side; the version grows by one even when only the critic trains."""
        groups, old = experience.groups, experience.policy_logprobs
        if self.critic is None:
            return await self.policy.update(groups, advantages, old)
        waits = experience.step <= self.critic_config.policy_waits_steps
        for_policy = replace(advantages, keep=np.zeros_like(advantages.keep)) if waits else advantages
        metrics, of_critic = await asyncio.gather(
            self.policy.update(groups, for_policy, old),
            self.critic.update(groups, advantages, experience.values or ()),
        )
        return {**metrics, **of_critic, "policy/waits": float(waits)}
