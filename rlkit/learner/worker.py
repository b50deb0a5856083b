"""Learner ranks as Ray actors, and the group of them that the trainer talks to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.base import Advantages, Algorithm
from rlkit.config.schema import RunConfig
from rlkit.experience import Group
from rlkit.rollout.weights import WeightBundle


class LearnerWorker:
    """One rank. Use through Ray."""

    def __init__(self, rank: int, config: RunConfig, model_path: str, algorithm: Algorithm, log_path: str) -> None:
        from rlkit.tracking.library_logs import actor_logging

        actor_logging(Path(log_path))
        self.rank, self.config, self.model_path, self.algorithm = rank, config, model_path, algorithm

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks to meet at (asked of rank 0)."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as s:
            s.bind((host, 0))
            return host, int(s.getsockname()[1])

    def start(self, host: str, port: int) -> int:
        """Join the other ranks and load the policy. Returns its number of parameters."""
        import torch

        from rlkit.learner.engine import init_process_group
        from rlkit.learner.policy import PolicyLearner

        config = self.config
        torch.manual_seed(config.seed)
        init_process_group(self.rank, config.learner.ranks, host, port, config.cluster.device)
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

    def update(self, groups: Sequence[Group], advantages: Advantages) -> dict[str, float]:
        """See PolicyLearner.update."""
        return self.learner.update(groups, advantages)

    def logprobs(self, groups: Sequence[Group], which: str) -> list[np.ndarray]:
        """See PolicyLearner.group_logprobs."""
        return self.learner.group_logprobs(groups, which)

    def weights(self, canary: Sequence[int]) -> tuple[WeightBundle | None, np.ndarray]:
        """The current weights (rank 0; all ranks take part) and the canary's log-probs under them."""
        bundle = WeightBundle.pack(self.learner.version, self.learner.named_weights())
        return (bundle if self.rank == 0 else None), self.learner.sequence_logprobs(canary)

    def save(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder, tokenizer included."""
        from rlkit.data.prompts import load_tokenizer

        self.learner.save(Path(folder))
        if self.rank == 0:
            tokenizer = load_tokenizer(self.model_path, trust_remote_code=self.config.model.trust_remote_code)
            if self.config.model.chat_template is not None:
                tokenizer.chat_template = Path(self.config.model.chat_template).read_text()
            tokenizer.save_pretrained(folder)


class LearnerGroup:
    """All ranks, called together; results are rank 0's."""

    def __init__(self, config: RunConfig, model_path: str, algorithm: Algorithm, logs: Path) -> None:
        import ray

        environment = {
            "OMP_NUM_THREADS": str(config.cluster.threads_per_actor),
            "OMP_WAIT_POLICY": "PASSIVE",  # the sampler shares these cores
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"DS_ACCELERATOR": "cpu"} if config.cluster.device == "cpu" else {}),
        }
        gpus = 0.3 if config.cluster.device == "cuda" else 0
        kind = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0)(LearnerWorker)
        self.ranks = [
            kind.options(runtime_env={"env_vars": environment}).remote(
                rank, config, model_path, algorithm, str(logs / f"learner-{rank}.log")
            )
            for rank in range(config.learner.ranks)
        ]

    async def start(self) -> int:
        """Load the policy on every rank; returns its number of parameters."""
        host, port = await self.ranks[0].address.remote()
        return int((await self._all("start", host, port))[0])

    async def update(self, groups: Any, advantages: Any) -> dict[str, float]:
        """One training step; arguments may be object references."""
        metrics: dict[str, float] = (await self._all("update", groups, advantages))[0]
        return metrics

    async def publishable(self, canary: Sequence[int]) -> tuple[Any, np.ndarray]:
        """(reference to the WeightBundle, canary log-probs [len(canary) - 1])."""
        pairs = [rank.weights.options(num_returns=2).remote(canary) for rank in self.ranks]
        canaries = await asyncio.gather(*(logprobs for _, logprobs in pairs))
        return pairs[0][0], canaries[0]

    async def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        await self._all("save", str(folder))

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self.ranks)))
