"""All rollout workers: groups out, weights in, each worker's version confirmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.config.schema import RunConfig
from rlkit.rollout.sampler import engine_environment
from rlkit.rollout.worker import GroupRequest, RolloutWorker

CANARY_TOLERANCE_FP32 = 1e-3
CANARY_TOLERANCE_HALF = 0.15


class WeightsNotLoadedError(RuntimeError):
    """A worker samples with other weights than it was given."""


class RolloutPool:
    """Used from the driver's asyncio loop."""

    def __init__(self, config: RunConfig, model_path: str, logs: Path) -> None:
        import ray

        self.config = config
        device = config.cluster.device
        parallel = config.rollout.tensor_parallel_size
        # A lone engine shares its GPU with a learner rank (0.3), a critic rank (0.1) and the rewards (0.1 in all); Ray
        # takes whole numbers only above 1.
        gpus = 0 if device == "cpu" else 0.5 if parallel == 1 else parallel
        environment = engine_environment(device, config.cluster.threads_per_actor)
        kind = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0, max_concurrency=1000)(RolloutWorker)
        self.workers = [
            kind.options(runtime_env={"env_vars": environment}).remote(
                model_path, config.model, config.rollout, device, config.seed, str(logs / f"rollout-{i}.log")
            )
            for i in range(config.rollout.workers)
        ]

    async def start(self) -> None:
        """Load all engines."""
        await asyncio.gather(*(worker.start.remote() for worker in self.workers))

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
        """References to lists of finished groups, as they finish, from all workers."""
        finished: asyncio.Queue[Any] = asyncio.Queue()

        async def relay(worker: Any, share: Sequence[GroupRequest]) -> None:
            try:
                async for ref in worker.generate.options(num_returns="streaming").remote(share):
                    finished.put_nowait(ref)
            except BaseException as error:
                finished.put_nowait(error)
                raise
            finished.put_nowait(None)

        shares = [list(requests[i :: len(self.workers)]) for i in range(len(self.workers))]
        tasks = [
            asyncio.create_task(relay(worker, share))
            for worker, share in zip(self.workers, shares, strict=True)
            if share
        ]
        try:
            open_streams = len(tasks)
            while open_streams:
                item = await finished.get()
                if item is None:
                    open_streams -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def load_weights(self, bundle: Any, version: int, canary: Sequence[int], wanted: np.ndarray) -> float:
        """Publish weights to every worker; returns the largest canary difference.

        Raises WeightsNotLoadedError unless each worker confirms the version and samples as the learner does: `wanted`
        [len(canary) - 1] are the learner's log-probs.
        """
        receipts = await asyncio.gather(*(worker.load_weights.remote(bundle, list(canary)) for worker in self.workers))
        worst = 0.0
        for i, receipt in enumerate(receipts):
            if receipt.version != version:
                raise WeightsNotLoadedError(
                    f"rollout worker {i} has weights of version {receipt.version}, not {version}"
                )
            difference = float(np.abs(receipt.canary_logprobs - wanted).max())
            if not difference <= self.tolerance:  # also true for NaN
                raise WeightsNotLoadedError(
                    f"rollout worker {i}: after version {version} was loaded, its log-probs of the canary prompt "
                    f"differ from the learner's by {difference:.3g}, more than {self.tolerance:g} "
                    "(rollout.canary_tolerance): it does not sample from the policy that is trained"
                )
            worst = max(worst, difference)
        return worst

    @property
    def tolerance(self) -> float:
        """The configured canary tolerance, or the one that suits the precision."""
        rollout = self.config.rollout
        if rollout.canary_tolerance is not None:
            return rollout.canary_tolerance
        fp32 = rollout.dtype == "float32" or (rollout.dtype == "auto" and self.config.cluster.device == "cpu")
        return CANARY_TOLERANCE_FP32 if fp32 else CANARY_TOLERANCE_HALF
