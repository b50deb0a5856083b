"""The policy learner as Ray actors: one rank, and the group of ranks that the trainer talks to."""

from __future__ import annotations

import shutil
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
from rlkit.rollout.weights import WeightBundle

if TYPE_CHECKING:
    from rlkit.learner.policy import PolicyLearner


class LearnerWorker(Rank):
    """One rank of the policy. Use through Ray."""

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

    def weights(self, canary: Sequence[int]) -> tuple[WeightBundle | None, np.ndarray]:
        """The current weights (rank 0; all ranks take part) and the canary's log-probs under them."""
        bundle = None
        if self.rank == 0:
            bundle = WeightBundle.pack(self.learner.version, self.learner.named_weights())
        else:
            for _ in self.learner.named_weights():
                pass  # ZeRO-3 gathers each tensor on all ranks
        return bundle, self.learner.sequence_logprobs(canary)

    def save(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder, tokenizer included."""
        from rlkit.data.prompts import load_tokenizer

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

    async def publishable(self, canary: Sequence[int]) -> tuple[Any, np.ndarray]:
        """(reference to the WeightBundle, canary log-probs [len(canary) - 1])."""
        pairs = [rank.weights.options(num_returns=2).remote(canary) for rank in self.ranks]
        canaries = await self.answers("weights", [logprobs for _, logprobs in pairs])
        return pairs[0][0], canaries[0]

    async def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        await self.call("save", str(folder))
