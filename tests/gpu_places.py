"""Started by test_placement.py: a Ray of its own with four GPUs that do not exist; which of them each actor gets.

Arguments: one per case, overrides separated by spaces. Prints a line of JSON per case: actor -> its GPUs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from rlkit.cluster.placement import Placement, plan_bundles, released, reserve
from rlkit.config.loading import load_config
from rlkit.config.plan import gpu_shares
from rlkit.rollout import pool

SECONDS = 200.0


def own_gpus() -> list[int]:
    """Of the process that asks."""
    return sorted(int(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"])


class Actor:
    """Stands in for a rank or a reward worker."""

    def gpus(self) -> list[int]:
        """Its own."""
        return own_gpus()


class Engine:
    """Stands in for RolloutWorker: does what vLLM's Ray executor does inside it, in a thread of an asyncio actor."""

    def __init__(self, *arguments: Any) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.workers: list[Any] = []

    async def gpus(self) -> list[int]:
        """Of its workers, in their order."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._gpus)

    def _gpus(self) -> list[int]:
        from ray.util.placement_group import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if "VLLM_RAY_BUNDLE_INDICES" not in os.environ:
            return own_gpus()
        assert own_gpus() == []
        group = get_current_placement_group()
        assert all(bundle.get("GPU", 0) <= 1 for bundle in group.bundle_specs)  # more is refused by vLLM
        for index in [] if self.workers else os.environ["VLLM_RAY_BUNDLE_INDICES"].split(","):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=int(index))
            share = float(os.environ["VLLM_RAY_PER_WORKER_GPUS"])
            options = {"num_cpus": 0, "num_gpus": share, "scheduling_strategy": strategy}
            self.workers.append(ray.remote(Actor).options(**options).remote())
        found = ray.get([worker.gpus.remote() for worker in self.workers], timeout=SECONDS)
        return [gpu for gpus in found for gpu in gpus]


async def places(overrides: list[str]) -> dict[str, list[int]]:
    """Reserve, start everything, kill and replace engine 0, ask."""
    config = load_config(["reward=polar", "run_dir=/nowhere/run", "cluster=single_gpu", *overrides]).config
    critics, rewards = config.critic.ranks, 1
    bundles = plan_bundles(config, critic_ranks=critics, reward_workers=rewards)
    with released(await reserve(config, bundles, 30.0)) as group:
        placement = Placement(group, bundles)
        engines = pool.RolloutPool(config, "model", Path("/nowhere"), placement.of("rollout"))
        await asyncio.gather(*(worker.gpus.remote() for worker in engines.workers))
        ray.kill(engines.workers[0], no_restart=True)
        engines.workers[0] = engines._make(0)
        actors = {f"rollout-{i}": worker for i, worker in enumerate(engines.workers)}
        shares = gpu_shares(config)
        kinds = {
            "learner": (config.learner.ranks, shares.learner),
            "critic": (critics, shares.critic),
            "reward": (rewards, shares.rewards / rewards),
        }
        for kind, (count, gpus) in kinds.items():
            for i in range(count):
                made = ray.remote(num_cpus=0, num_gpus=gpus)(Actor).options(**placement.of(kind)(i))
                actors[f"{kind}-{i}"] = made.remote()
        found = await asyncio.wait_for(asyncio.gather(*(actor.gpus.remote() for actor in actors.values())), SECONDS)
        for actor in actors.values():
            ray.kill(actor)
    return dict(zip(actors, found, strict=True))


def main() -> None:
    """All cases, one after the other."""
    pool.RolloutWorker = Engine  # type: ignore[misc,assignment]
    ray.init(
        num_gpus=4,
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    try:
        for case in sys.argv[1:]:
            print(json.dumps(asyncio.run(places(case.split()))), flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
