"""The policy learner as Ray actors: one rank, and the group of ranks that the trainer talks to.

The critic as Ray actors: one rank, and the group of ranks that the trainer talks to.

Policy and critic as the trainer sees them: one thing that gathers experience and learns from it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from algorithms.base import Advantages, Algorithm, Experience
from rlkit.cluster.placement import Place, Placement, anywhere
from rlkit.config.plan import gpu_shares, weight_way
from rlkit.config.schema import CriticConfig, RunConfig
from rlkit.experience import Group
from rlkit.learner.ranks import Rank, RankGroup
from rlkit.weights.bundle import WeightBundle

if TYPE_CHECKING:
    from rlkit.learner.critic import Critic
    from rlkit.learner.policy import PolicyLearner
    from rlkit.learner.sender import WeightSender


class LearnerWorker(Rank):
    """One rank of the policy. Use through Ray."""

    sender: WeightSender | None = None

    def load(self) -> int:
        """Load the policy. Returns its number of parameters."""
        from rlkit.learner.policy import PolicyLearner

        config = self.config
        self.learner = PolicyLearner(
            self.model_path,
            config.learner,
            self.algorithm,
            device=config.cluster.device,
            temperature=config.rollout.temperature,
            total_steps=config.trainer.total_steps * config.learner.minibatches_per_step,
            trust_remote_code=config.model.trust_remote_code,
        )
        return int(self.learner.engine.module.model.num_parameters())

    @property
    def trained(self) -> PolicyLearner:
        """The policy."""
        return self.learner

    def update(self, groups: Sequence[Group], advantages: Advantages) -> dict[str, float]:
        """See PolicyLearner.update."""
        return self.learner.update(groups, advantages)

    def logprobs(self, groups: Sequence[Group], which: str) -> list[np.ndarray]:
        """See PolicyLearner.group_logprobs."""
        return self.learner.group_logprobs(groups, which)

    def weights(self, canary: Sequence[int]) -> tuple[WeightBundle | None, int, np.ndarray]:
        """The current weights (rank 0; all ranks take part), their version, and the canary's log-probs under them.

        An empty canary costs no forward pass, which an offloaded model could not do.
        """
        bundle = None
        if self.rank == 0:
            bundle = WeightBundle.pack(self.learner.version, self.learner.named_weights())
        else:
            for _ in self.learner.named_weights():
                pass  # ZeRO-3 gathers on all ranks
        logprobs = self.learner.sequence_logprobs(canary) if canary else np.empty(0, dtype=np.float32)
        return bundle, self.learner.version, logprobs

    def canary_logprobs(self, canary: Sequence[int]) -> np.ndarray:
        """[len(canary) - 1] under the current weights."""
        return self.learner.sequence_logprobs(canary)

    def send_weights(self, workers: Sequence[Any], version: int) -> str:
        """Send the current weights to rollout workers that are ready for them; their checksum (rank 0).

        Raises ValueError if `version` is not theirs: the workers only hear it from who asks for the transfer.
        """
        if version != self.learner.version:
            raise ValueError(f"the learner's weights are of version {self.learner.version}, not {version}")
        if self.sender is None:
            from rlkit.learner.sender import WeightSender

            config = self.config
            self.sender = WeightSender(
                self.learner,
                weight_way(config.cluster, config.rollout, config.learner),
                config.cluster.weight_bucket_mib * 2**20,
                config.rollout.tensor_parallel_size,
                config.trainer.step_timeout_seconds,
                self.address,
            )
        return self.sender.send(workers, version)

    def offload(self) -> None:
        """The reference policy, too."""
        super().offload()
        self._move_reference("cpu")

    def reload(self) -> None:
        """The reverse of offload."""
        super().reload()
        self._move_reference(self.config.cluster.device)

    def _move_reference(self, device: str) -> None:
        import torch

        if self.learner.reference is not None:
            self.learner.reference.to(device)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def save(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder, tokenizer included."""
        from rlkit.data.rendering import load_tokenizer

        self.learner.save(Path(folder))
        if self.rank == 0:
            tokenizer = load_tokenizer(self.model_path, trust_remote_code=self.config.model.trust_remote_code)
            if self.config.model.chat_template is not None:
                tokenizer.chat_template = Path(self.config.model.chat_template).expanduser().read_text(encoding="utf-8")
            tokenizer.save_pretrained(folder)
            generation = Path(self.model_path) / "generation_config.json"
            if generation.is_file():  # some of the tokens that end a response may be named only there
                shutil.copy(generation, folder)


class LearnerGroup(RankGroup):
    """All ranks of the policy."""

    def __init__(
        self, config: RunConfig, model_path: str, algorithm: Algorithm, logs: Path, place: Place = anywhere
    ) -> None:
        gpus = gpu_shares(config).learner
        super().__init__(LearnerWorker, "learner", config.learner, config, model_path, algorithm, logs, gpus, place)

    async def update(self, groups: Any, advantages: Any) -> dict[str, float]:
        """One training step; arguments may be object references."""
        metrics: dict[str, float] = await self.call("update", groups, advantages)
        return metrics

    async def logprobs(self, groups: Any, which: str) -> list[np.ndarray]:
        """[T] of every sample, under the `policy` or the `reference`."""
        logprobs: list[np.ndarray] = await self.call("logprobs", groups, which)
        return logprobs

    async def canary_logprobs(self, canary: Sequence[int]) -> np.ndarray:
        """[len(canary) - 1] under the current weights."""
        logprobs: np.ndarray = await self.call("canary_logprobs", canary)
        return logprobs

    async def publishable(self, canary: Sequence[int]) -> tuple[Any, int, np.ndarray]:
        """Reference to a WeightBundle (which may still be on its way), its version, canary log-probs [canary - 1]."""
        calls = [rank.weights.options(num_returns=3).remote(list(canary)) for rank in self.ranks]
        logprobs = await self.answers("weights", [logprobs for _, _, logprobs in calls])
        bundle, version, _ = calls[0]
        return bundle, await version, logprobs[0]

    async def send_weights(self, workers: Sequence[Any], version: int) -> str:
        """Send the current weights to rollout workers that are ready for them; returns their checksum."""
        checksum: str = await self.call("send_weights", list(workers), version)
        return checksum

    async def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        await self.call("save", str(folder))


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


@dataclass
class JointLearner:
    """The policy, and the critic if the algorithm needs one; started side by side."""

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
        """Make the actors without waiting for them."""
        critic = None
        if algorithm.needs().critic:
            critic = CriticGroup(config, critic_path, algorithm, logs, placement.of("critic"))
        policy = LearnerGroup(config, policy_path, algorithm, logs, placement.of("learner"))
        return cls(algorithm, policy, critic, config.critic)

    async def save_state(self, folder: Path) -> dict[str, dict[str, int]]:
        """Write `learner.safetensors`, and `critic.safetensors` where there is one; returns their counters."""
        parts = self._parts()
        saved = await asyncio.gather(*(part.save_state(folder / f"{name}.safetensors") for name, part in parts.items()))
        return dict(zip(parts, saved, strict=True))

    async def load_state(self, folder: Path, counters: dict[str, dict[str, int]]) -> None:
        """The reverse of save_state."""
        await asyncio.gather(
            *(part.load_state(folder / f"{name}.safetensors", counters[name]) for name, part in self._parts().items())
        )

    async def offload(self) -> None:
        """Make room on the GPUs, if this is configured."""
        await asyncio.gather(*(part.offload() for part in self._parts().values()))

    async def reload(self) -> None:
        """The reverse of offload."""
        await asyncio.gather(*(part.reload() for part in self._parts().values()))

    async def watch(self) -> None:
        """Raises RayActorError soon after a rank dies."""
        await asyncio.gather(*(part.watch() for part in self._parts().values()))

    def _parts(self) -> dict[str, RankGroup]:
        return {"learner": self.policy, **({"critic": self.critic} if self.critic is not None else {})}

    async def experience(self, groups: Sequence[Group], step: int) -> Experience:
        """The groups with the values and log-probs that the algorithm needs for its advantages."""
        values = await self.critic.values(groups) if self.critic is not None else None
        if not self.algorithm.needs().token_kl:
            return Experience(groups, step, values)
        policy, reference = [await self.policy.logprobs(groups, which) for which in ("policy", "reference")]
        return Experience(groups, step, values, policy, reference)

    async def update(self, experience: Experience, advantages: Advantages) -> dict[str, float]:
        """Train policy and critic side by side; the policy's version grows by one, also while it waits."""
        groups = experience.groups
        if self.critic is None:
            return await self.policy.update(groups, advantages)
        waits = experience.step <= self.critic_config.policy_waits_steps
        for_policy = replace(advantages, keep=np.zeros_like(advantages.keep)) if waits else advantages
        metrics, of_critic = await asyncio.gather(
            self.policy.update(groups, for_policy), self.critic.update(groups, advantages, experience.values)
        )
        return {**metrics, **of_critic, "policy/waits": float(waits)}
