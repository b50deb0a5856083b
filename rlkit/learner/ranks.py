"""Data-parallel ranks of one trained model as Ray actors that are always called together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from algorithms.base import Algorithm
from rlkit.cluster.placement import Place
from rlkit.cluster.processes import free_port
from rlkit.cluster.waiting import waiting
from rlkit.config.plan import offloads, shares_gpus
from rlkit.config.schema import LearnerConfig, RunConfig
from rlkit.models.folder import enter_working_folder

if TYPE_CHECKING:
    from rlkit.weights.tensor_file import WrittenFile

WATCH_SECONDS = 5.0
MARGIN = 1.25
"""Ratio of the timeout of the ranks' collective operations to the driver's deadline."""


class Trained(Protocol):
    engine: Any

    def counters(self) -> dict[str, int]:
        """Optimizer steps and versions, for checkpoints."""
        ...

    def set_counters(self, counters: dict[str, int]) -> None: ...


class Rank(ABC):
    """One rank. Subclasses load their model in `load`, after all ranks have met."""

    def __init__(self, rank: int, config: RunConfig, model_path: str, algorithm: Algorithm, log_path: str) -> None:
        from rlkit.tracking.logs import actor_logging

        actor_logging(Path(log_path))
        enter_working_folder()
        self.rank, self.config, self.model_path, self.algorithm = rank, config, model_path, algorithm

    def alive(self) -> bool:
        return True

    def address(self) -> tuple[str, int]:
        """Return a host and a free port where the ranks meet (called on rank 0)."""
        import ray

        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def start(self, ranks: int, host: str, port: int) -> Any:
        import torch

        from rlkit.learner.engine import init_process_group

        torch.manual_seed(self.config.seed)
        trainer = self.config.trainer
        # The driver's deadlines expire first, because its messages say who waited for what.
        seconds = max(trainer.step_timeout_seconds, trainer.startup_timeout_seconds) * MARGIN
        init_process_group(self.rank, ranks, host, port, self.config.cluster.device, seconds)
        loaded = self.load()
        self.release_cache()
        return loaded

    def release_cache(self) -> None:
        """On a GPU that others share, release the memory that torch's allocator caches, before an engine wakes
        there."""
        import torch

        if shares_gpus(self.config.cluster) and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @abstractmethod
    def load(self) -> Any: ...

    @property
    @abstractmethod
    def trained(self) -> Trained: ...

    def offload(self) -> None:
        from rlkit.learner.engine import offload

        offload(self.trained.engine)

    def reload(self) -> None:
        from rlkit.learner.engine import reload

        reload(self.trained.engine)

    def checkpoint_bytes(self) -> int:
        """Bytes that `save_state` writes, except random states; subclasses add their own files."""
        from rlkit.learner.state import state_metas
        from rlkit.weights.tensor_file import file_bytes

        return file_bytes(state_metas(self.trained.engine))

    def save_state(self, file: str) -> tuple[dict[str, int], WrittenFile | None]:
        """Write weights and moments (rank 0) and this rank's random state; return the counters and rank 0's file."""
        import torch
        from safetensors.torch import save_file

        from rlkit.learner.state import save_full_state

        written = save_full_state(self.trained.engine, Path(file), write=self.rank == 0)
        random = {"cpu": torch.get_rng_state()}
        if self.config.cluster.device == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        save_file(random, f"{file}.random-{self.rank}")
        return self.trained.counters(), written

    def load_state(self, file: str, counters: dict[str, int]) -> None:
        """Restore the state. A rank that the saved run did not have keeps its own random state."""
        import torch
        from safetensors.torch import load_file

        from rlkit.learner.state import load_full_state
        from rlkit.weights.tensor_file import TensorFile

        load_full_state(self.trained.engine, TensorFile(Path(file)))
        self.trained.set_counters(counters)
        if Path(f"{file}.random-{self.rank}").is_file():
            random = load_file(f"{file}.random-{self.rank}")
            torch.set_rng_state(random["cpu"])
            if "cuda" in random and self.config.cluster.device == "cuda":
                torch.cuda.set_rng_state(random["cuda"])


class RankGroup:
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
        place: Place,
    ) -> None:
        """`name`: used for the log files. `gpus`: number that each rank requests from Ray."""
        import ray

        self.name, self.trainer_config, self.section = name, config.trainer, section
        self._offloads, self.offloaded = offloads(config, section), False
        environment = {
            "OMP_NUM_THREADS": str(config.cluster.threads_per_actor),
            "OMP_WAIT_POLICY": "PASSIVE",  # the sampler shares these cores
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"DS_ACCELERATOR": "cpu"} if config.cluster.device == "cpu" else {}),
        }
        actor = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0)(kind)
        self.ranks = [
            actor.options(runtime_env={"env_vars": environment}, **place(rank)).remote(
                rank, config, model_path, algorithm, str(logs / f"{name}-{rank}.log")
            )
            for rank in range(section.ranks)
        ]

    async def start(self) -> Any:
        (host, port) = (await self.answers("address", [self.ranks[0].address.remote()]))[0]
        return await self.call("start", len(self.ranks), host, port)

    async def checkpoint_bytes(self) -> int:
        """Approximate disk space of a checkpoint taken now."""
        return sum(await self.answers("checkpoint_bytes", [self.ranks[0].checkpoint_bytes.remote()]))

    async def save_state(self, file: Path) -> tuple[dict[str, int], WrittenFile]:
        """Write everything that training changed; return the counters for `load_state`, and the file."""
        counters, written = await self.call("save_state", str(file))
        return counters, written

    async def load_state(self, file: Path, counters: dict[str, int]) -> None:
        """Restore the state, with any number of ranks and any ZeRO stage."""
        await self.call("load_state", str(file), counters)

    async def offload(self) -> None:
        if self._offloads and not self.offloaded:
            await self.call("offload")
            self.offloaded = True

    async def reload(self) -> None:
        """Undo `offload`; required before anything but the weights is used."""
        if self.offloaded:
            await self.call("reload")
            self.offloaded = False

    async def watch(self) -> NoReturn:
        """Raise RayActorError soon after a rank dies, even if no call is pending."""
        while True:
            await asyncio.gather(*(rank.alive.remote() for rank in self.ranks))  # a busy rank answers later
            await asyncio.sleep(WATCH_SECONDS)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method on every rank; return rank 0's result. Arguments may be object references."""
        return (await self.answers(method, [getattr(rank, method).remote(*arguments) for rank in self.ranks]))[0]

    async def call_each(self, method: str, shares: Sequence[Any]) -> list[Any]:
        """Call a method on every rank with its replica's share; return one result per replica."""
        of_ranks = [share for share in shares for _ in range(self.section.sequence_parallel)]
        ranks = zip(self.ranks, of_ranks, strict=True)
        results = await self.answers(method, [getattr(rank, method).remote(share) for rank, share in ranks])
        return results[:: self.section.sequence_parallel]

    async def answers(self, method: str, calls: Sequence[Any]) -> list[Any]:
        """Await the calls. Raises WaitedTooLongError, naming the ranks that have not answered."""
        missing = set(range(len(calls)))

        async def one(rank: int, call: Any) -> Any:
            result = await call
            missing.discard(rank)
            return result

        name = "startup_timeout_seconds" if method in ("address", "start") else "step_timeout_seconds"
        seconds: float = getattr(self.trainer_config, name)
        who = f"the {self.name}"
        async with waiting(who, lambda: f"`{method}` of rank {_listed(missing)}", seconds, f"trainer.{name}"):
            return await asyncio.gather(*(one(rank, call) for rank, call in enumerate(calls)))


def _listed(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
