"""Policy and critic as the trainer sees them: a single object that gathers experience and learns from it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from algorithms.base import POLICY, REFERENCE, Advantages, Algorithm, Experience, Render
from rlkit.cluster.placement import Placement
from rlkit.config.schema import CriticConfig, RunConfig
from rlkit.experience import Group
from rlkit.experience.types import FloatArray, recorded_group
from rlkit.learner.actors import CriticGroup, LearnerGroup
from rlkit.learner.ranks import RankGroup
from rlkit.learner.references import ReferenceCache, fingerprint

if TYPE_CHECKING:
    from rlkit.weights.tensor_file import WrittenFile


CACHED_AT_ONCE = 256
"""Groups computed at a time."""


@dataclass
class JointLearner:
    algorithm: Algorithm
    policy: LearnerGroup
    critic: CriticGroup | None
    critic_config: CriticConfig
    render: Render
    """Renders prompts for passes over edited prompts."""
    references: ReferenceCache | None = None
    """Cached log-probs of recorded responses, in place of a reference policy."""

    @classmethod
    def create(
        cls,
        config: RunConfig,
        algorithm: Algorithm,
        policy_path: str,
        critic_path: str,
        logs: Path,
        placement: Placement,
        render: Render,
    ) -> JointLearner:
        critic = None
        if algorithm.needs().critic:
            critic = CriticGroup(config, critic_path, algorithm, logs, placement.of("critic"))
        policy = LearnerGroup(config, policy_path, algorithm, logs, placement.of("learner"))
        return cls(algorithm, policy, critic, config.critic, render)

    async def checkpoint_bytes(self) -> int:
        """Approximate size of what `save_state` and `policy.save` write."""
        return sum(await asyncio.gather(*(part.checkpoint_bytes() for part in self._parts().values())))

    async def save_state(self, folder: Path) -> tuple[dict[str, dict[str, int]], list[WrittenFile]]:
        """Write `learner.safetensors`, `critic.safetensors` if there is a critic, and `reference` if it moves; return
        counters by name, and the files."""
        parts = self._parts()
        saved = await asyncio.gather(*(part.save_state(folder / f"{name}.safetensors") for name, part in parts.items()))
        counters = {name: counted for name, (counted, _) in zip(parts, saved, strict=True)}
        moved = await self.policy.save_frozen(REFERENCE, folder / REFERENCE) if self._reference_moves else []
        return counters, [*(written for _, written in saved), *moved]

    @property
    def _reference_moves(self) -> bool:
        return self.algorithm.needs().reference_policy and self.algorithm.config.reference_every_steps > 0

    async def load_state(self, folder: Path, counters: dict[str, dict[str, int]]) -> None:
        await asyncio.gather(
            *(part.load_state(folder / f"{name}.safetensors", counters[name]) for name, part in self._parts().items())
        )
        if self._reference_moves:
            await self.policy.hold(REFERENCE, folder / REFERENCE)

    async def offload(self) -> None:
        await asyncio.gather(*(part.offload() for part in self._parts().values()))

    async def reload(self) -> None:
        await asyncio.gather(*(part.reload() for part in self._parts().values()))

    async def watch(self) -> None:
        """Raises RayActorError soon after a rank dies."""
        await asyncio.gather(*(part.watch() for part in self._parts().values()))

    def _parts(self) -> dict[str, RankGroup]:
        return {"learner": self.policy, **({"critic": self.critic} if self.critic is not None else {})}

    async def use_references(self, file: Path, model: Path, groups: Iterable[Group]) -> None:
        """Take reference log-probs from a file from now on, after computing those that it lacks. The policy must still
        be the initial model: it serves as the reference, so that no other model is loaded."""
        policy = self.policy
        facts = policy.temperature, policy.section.dtype, policy.device
        cache = ReferenceCache(file, await asyncio.to_thread(fingerprint, model, *facts))
        await cache.fill(groups, lambda some: policy.logprobs(some, POLICY), CACHED_AT_ONCE)
        self.references = cache

    async def experience(self, groups: Sequence[Group], step: int) -> Experience:
        """Add the values and log-probs that the algorithm's advantages need, or its loss in every epoch, to the
        groups."""
        needs = self.algorithm.needs()
        if needs.demonstrations:
            groups = [one for g in groups for one in (g, recorded_group(g.prompt, f"{g.id}-recorded", step))]
        values = await self.critic.values(groups) if self.critic is not None else None
        several = self.policy.section.epochs_per_step > 1
        of_groups: dict[str, Sequence[FloatArray]] = {}
        if needs.token_kl or several:
            of_groups[POLICY] = await self.policy.logprobs(groups, POLICY)
        if self.references is not None:
            of_groups[REFERENCE] = self.references.of(groups)
        elif needs.token_kl or (needs.reference_policy and several):
            of_groups[REFERENCE] = await self.policy.logprobs(groups, REFERENCE)
        logprobs = {}
        for name, one in needs.passes.items():
            chosen = self.algorithm.groups_for(name, groups, self.render)
            if chosen is groups and one.model in of_groups:
                logprobs[name] = of_groups[one.model]
            else:
                logprobs[name] = await self.policy.logprobs(chosen, one.model)
        return Experience(groups, step, values, of_groups.get(POLICY), of_groups.get(REFERENCE), logprobs)

    async def heldout(self, groups: Sequence[Group], step: int) -> Experience:
        """Return recorded groups with the log-probs that `Algorithm.heldout` reads."""
        policy = await self.policy.logprobs(groups, POLICY)
        reference = None
        if self.algorithm.needs().reference_policy:
            cached = self.references
            reference = await self.policy.logprobs(groups, REFERENCE) if cached is None else cached.of(groups)
        return Experience(groups, step, None, policy, reference)

    async def update(self, experience: Experience, advantages: Advantages) -> dict[str, float]:
        """Train policy and critic in parallel; the version increases by one even if only the critic trains."""
        if self.critic is None:
            return await self.policy.update(experience, advantages)
        waits = experience.step <= self.critic_config.policy_waits_steps
        for_policy = replace(advantages, keep=np.zeros_like(advantages.keep)) if waits else advantages
        metrics, of_critic = await asyncio.gather(
            self.policy.update(experience, for_policy), self.critic.update(experience, advantages)
        )
        return {**metrics, **of_critic, "policy/waits": float(waits)}
