"""Data-parallel ranks of one trained model as Ray actors that are always called together."""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from algorithms.base import Algorithm
from rlkit.config.schema import LearnerConfig, RunConfig


class Rank(ABC):
    """One rank, used through Ray. Subclasses load their model in `load`, when all ranks have met."""

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

    def start(self, ranks: int, host: str, port: int) -> Any:
        """Join the other ranks and load the model."""
        import torch

        from rlkit.learner.engine import init_process_group

        torch.manual_seed(self.config.seed)
        init_process_group(self.rank, ranks, host, port, self.config.cluster.device)
        return self.load()

    @abstractmethod
    def load(self) -> Any:
        """Load this rank's model."""


class RankGroup:
    """All ranks of one model, called together; results are rank 0's."""

    def __init__(
        self,
        kind: type[Rank],
        name: str,
        section: LearnerConfig,
        config: RunConfig,
        model_path: str,
        algorithm: Algorithm,
        logs: Path,
        gpus: float,
    ) -> None:
        """`name` names the log files; `gpus` is the share of a GPU each rank gets on CUDA."""
        import ray

        environment = {
            "OMP_NUM_THREADS": str(config.cluster.threads_per_actor),
            "OMP_WAIT_POLICY": "PASSIVE",  # the sampler shares these cores
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"DS_ACCELERATOR": "cpu"} if config.cluster.device == "cpu" else {}),
        }
        actor = ray.remote(num_cpus=0, num_gpus=gpus if config.cluster.device == "cuda" else 0, max_restarts=0)(kind)
        self.ranks = [
            actor.options(runtime_env={"env_vars": environment}).remote(
                rank, config, model_path, algorithm, str(logs / f"{name}-{rank}.log")
            )
            for rank in range(section.ranks)
        ]

    async def start(self) -> Any:
        """Let the ranks meet and load the model on each."""
        host, port = await self.ranks[0].address.remote()
        return await self.call("start", len(self.ranks), host, port)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method on every rank; rank 0's result. Arguments may be object references."""
        results = await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self.ranks))
        return results[0]
