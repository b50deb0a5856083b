"""Policy and critic as Ray actors: one rank of each, and the groups of ranks that are called together."""

from __future__ import annotations

import shutil
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from algorithms.base import REFERENCE, Advantages, Algorithm, Experience
from rlkit.cluster.placement import Place, anywhere
from rlkit.config.parts import plain
from rlkit.config.plan import gpu_shares, published_adapter, references_are_cached, weight_route
from rlkit.config.schema import RunConfig
from rlkit.diagnostics.group import measuring
from rlkit.experience import Group
from rlkit.learner.batches import Microbatch, PolicyRows, Share, ValueRows
from rlkit.learner.dealing import passes, policy_shares, value_shares
from rlkit.learner.ranks import Rank, RankGroup
from rlkit.learner.signals import Seen, joined
from rlkit.tracking.tokens import Signals, watched_samples
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Canary

if TYPE_CHECKING:
    from rlkit.learner.critic import Critic
    from rlkit.learner.policy import PolicyLearner
    from rlkit.learner.sender import WeightSender
    from rlkit.weights.tensor_file import WrittenFile


class LearnerWorker(Rank):
    sender: WeightSender | None = None

    def load(self) -> None:
        from rlkit.learner.policy import PolicyLearner

        config = self.config
        self.learner = PolicyLearner(
            self.model_path,
            config.learner,
            self.algorithm,
            device=config.cluster.device,
            temperature=config.rollout.temperature,
            total_steps=config.trainer.total_steps * config.learner.optimizer_steps,
            trust_remote_code=config.model.trust_remote_code,
            reference=not references_are_cached(config.rollout, self.algorithm),
            lora=config.model.lora,
            diagnostics=measuring(config.diagnostics, plain(config)),
        )

    @property
    def trained(self) -> PolicyLearner:
        return self.learner

    def learn(self, share: Share[PolicyRows]) -> tuple[dict[str, float], list[Seen]]:
        metrics = self.learner.learn(share)
        seen = self.learner.watch.seen()
        self.release_cache()
        return metrics, seen

    def logprobs(self, work: tuple[str, Sequence[Microbatch]]) -> np.ndarray:
        """Log-probs [R over all micro-batches] under the policy or a model that is held."""
        which, microbatches = work
        return self.learner.logprobs(microbatches, which)

    def hold(self, name: str, path: str) -> None:
        self.learner.hold(name, path)

    def weights(self) -> tuple[WeightBundle | None, int]:
        """Return the weights that engines get (on rank 0; with ZeRO-3 all ranks gather) and their version."""
        bundle, config = None, self.config
        whole = published_adapter(config.cluster, config.rollout, config.model) is None
        weights = self.learner.named_weights() if whole else self.learner.adapter_weights()
        if self.rank == 0:
            if config.learner.zero_stage == 3:  # gathered tensors are freed again
                weights = ((name, tensor.to("cpu", copy=True)) for name, tensor in weights)
            bundle = WeightBundle.pack(self.learner.version, weights)
        else:
            for _ in weights:
                pass  # ZeRO-3 gathers on all ranks
        return bundle, self.learner.version

    def canary_logprobs(self, canary: Canary) -> np.ndarray:
        """Log-probs of all sequences under the current weights, each without its first token. An empty canary needs no
        forward pass, which would be impossible for an offloaded model."""
        return self.learner.canary_logprobs(canary) if canary else np.empty(0, dtype=np.float32)

    def send_weights(self, workers: Sequence[Any], version: int) -> str:
        """Send weights to ready rollout workers; return the checksum (rank 0). Raises ValueError if `version` is not
        current."""
        if version != self.learner.version:
            raise ValueError(f"the learner's weights are of version {self.learner.version}, not {version}")
        if self.sender is None:
            from rlkit.learner.sender import WeightSender

            config = self.config
            self.sender = WeightSender(
                self.learner,
                weight_route(config.cluster, config.rollout, config.learner, config.model),
                config.cluster.weight_bucket_mib * 2**20,
                config.rollout.tensor_parallel_size,
                config.trainer.step_timeout_seconds,
                self.address,
            )
        return self.sender.send(workers, version)

    def offload(self) -> None:
        super().offload()
        self._move_frozen("cpu")

    def reload(self) -> None:
        super().reload()
        self._move_frozen(self.config.cluster.device)

    def _move_frozen(self, device: str) -> None:
        import torch

        from rlkit.learner.frozen import move_frozen

        still = {id(model): model for model in (*self.learner.frozen.values(), self.learner.base) if model is not None}
        for model in still.values():
            move_frozen(model, device)
        if still and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def checkpoint_bytes(self) -> int:
        from rlkit.learner.adapter import adapter_metas

        weights = sum(meta.bytes for meta in self.learner.weight_metas())
        moving = REFERENCE in self.learner.frozen and self.algorithm.config.reference_every_steps > 0
        factors = adapter_metas(self.learner.engine.module.model) if self.config.model.lora else []
        return super().checkpoint_bytes() + weights * (1 + moving) + sum(meta.bytes for meta in factors)

    def save_frozen(self, name: str, folder: str) -> list[WrittenFile]:
        """Write a model that is held; return its files (on rank 0)."""
        return self.learner.save(Path(folder), name)

    def save(self, folder: str) -> list[WrittenFile]:
        """Write the policy's folder; return the files of the weights (on rank 0)."""
        from rlkit.data.rendering import load_tokenizer

        written = self.learner.save(Path(folder))
        if self.rank == 0:
            tokenizer = load_tokenizer(self.model_path, trust_remote_code=self.config.model.trust_remote_code)
            if self.config.model.chat_template is not None:
                tokenizer.chat_template = Path(self.config.model.chat_template).expanduser().read_text(encoding="utf-8")
            tokenizer.save_pretrained(folder)
            generation = Path(self.model_path) / "generation_config.json"
            if generation.is_file():  # some of the tokens that end a response may only be named there
                shutil.copy(generation, folder)
        return written

    def save_adapter(self, folder: str) -> list[WrittenFile]:
        """Write the adapter's folder; return the file of its weights (on rank 0)."""
        return self.learner.save_adapter(self.model_path, Path(folder))


class LearnerGroup(RankGroup):
    def __init__(
        self, config: RunConfig, model_path: str, algorithm: Algorithm, logs: Path, place: Place = anywhere
    ) -> None:
        gpus = gpu_shares(config).learner
        self.needs, self.seed, self.lora = algorithm.needs(), config.seed, config.model.lora
        self.temperature, self.device = config.rollout.temperature, config.cluster.device
        self.tracking = config.tracking
        self.signals: Signals = {}
        """Signals of the last update, for its record."""
        super().__init__(LearnerWorker, "learner", config.learner, config, model_path, algorithm, logs, gpus, place)

    async def update(self, experience: Experience, advantages: Advantages) -> dict[str, float]:
        """Run one training step."""
        shares, planned = policy_shares(
            experience.groups,
            advantages,
            self.section,
            self.needs,
            seed=(self.seed, experience.step),
            old_logprobs=experience.policy_logprobs,
            # With the KL in the reward, the loss needs none.
            reference_logprobs=None if self.needs.token_kl else experience.reference_logprobs,
            watched=watched_samples(experience, self.tracking),
        )
        of_ranks = await self.call_each("learn", shares)
        self.signals = joined(seen for _, seen in of_ranks)
        metrics: dict[str, float] = of_ranks[0][0]
        return metrics | planned

    async def logprobs(self, groups: Sequence[Group], which: str) -> list[np.ndarray]:
        """Log-probs [T] of every sample, in order, under the policy or a model that the ranks hold."""
        work = passes(groups, self.section)
        results = await self.call_each("logprobs", [(which, dealt) for dealt in work.microbatches])
        return work.per_sample(results)

    async def canary_logprobs(self, canary: Canary) -> np.ndarray:
        logprobs: np.ndarray = await self.call("canary_logprobs", canary)
        return logprobs

    def publishable(self, canary: Canary) -> tuple[Any, Coroutine[Any, Any, tuple[int, np.ndarray]]]:
        """Return a reference to the WeightBundle being packed, and an awaitable of its version and the canary's
        log-probs, which are computed while others may already load the bundle."""
        packing = [rank.weights.options(num_returns=2).remote() for rank in self.ranks]
        computing = [rank.canary_logprobs.remote(canary) for rank in self.ranks]

        async def proof() -> tuple[int, np.ndarray]:
            versions = await self.answers("weights", [version for _, version in packing])
            return versions[0], (await self.answers("canary_logprobs", computing))[0]

        return packing[0][0], proof()

    async def send_weights(self, workers: Sequence[Any], version: int) -> str:
        """Send the current weights to ready rollout workers; return their checksum."""
        checksum: str = await self.call("send_weights", list(workers), version)
        return checksum

    async def hold(self, name: str, folder: Path) -> None:
        """Load a model for `logprobs`, replacing any of the same name."""
        await self.call("hold", name, str(folder))

    async def save_frozen(self, name: str, folder: Path) -> list[WrittenFile]:
        written: list[WrittenFile] = await self.call("save_frozen", name, str(folder))
        return written

    async def save(self, folder: Path) -> list[WrittenFile]:
        """Write the policy as a Hugging Face folder, and its adapter next to it; return the files of weights."""
        written: list[WrittenFile] = await self.call("save", str(folder))
        if self.lora is not None:
            written += await self.call("save_adapter", str(folder.with_name("adapter")))
        return written


class CriticWorker(Rank):
    def load(self) -> None:
        from rlkit.learner.critic import Critic

        config = self.config
        self.critic = Critic(
            self.model_path,
            config.critic,
            self.algorithm,
            device=config.cluster.device,
            total_steps=config.trainer.total_steps * config.critic.optimizer_steps,
            trust_remote_code=config.model.trust_remote_code,
        )

    @property
    def trained(self) -> Critic:
        return self.critic

    def values(self, microbatches: Sequence[Microbatch]) -> np.ndarray:
        return self.critic.values(microbatches)

    def learn(self, share: Share[ValueRows]) -> dict[str, float]:
        metrics = self.critic.learn(share)
        self.release_cache()
        return metrics


class CriticGroup(RankGroup):
    def __init__(
        self, config: RunConfig, model_path: str, algorithm: Algorithm, logs: Path, place: Place = anywhere
    ) -> None:
        gpus = gpu_shares(config).critic
        self.seed = config.seed
        super().__init__(CriticWorker, "critic", config.critic, config, model_path, algorithm, logs, gpus, place)

    async def values(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Values [T] of every sample, in order."""
        work = passes(groups, self.section)
        return work.per_sample(await self.call_each("values", work.microbatches))

    async def update(self, experience: Experience, advantages: Advantages) -> dict[str, float]:
        """Run one training step."""
        values, seed = experience.values or (), (self.seed, experience.step)
        shares = value_shares(experience.groups, advantages, values, self.section, seed=seed)
        metrics: dict[str, float] = (await self.call_each("learn", shares))[0]
        return metrics
