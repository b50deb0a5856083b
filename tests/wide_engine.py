"""Started by test_placement.py: a vLLM engine over two places that it shares with ranks, on a Ray with invented GPUs.

vLLM computes on the CPU: a plugin of its own kind (`write_plugin`) calls this platform's devices "GPU", so that its Ray
executor asks for them. Arguments: way of the weights, folder for logs. Prints JSON: the log-probs of the canary, and
those of the engine that replaced this one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import ray

from rlkit.cluster.placement import Placement, plan_bundles, released, reserve
from rlkit.config.loading import load_config
from rlkit.config.plan import gpu_shares
from rlkit.config.schema import RunConfig
from rlkit.models.folder import model_folder
from rlkit.rollout import pool

SECONDS = 400.0
CANARY = list(range(5, 15))


def write_plugin(folder: Path) -> None:
    """What vLLM finds on the path `folder`: a platform that is the CPU, with devices that Ray calls GPU."""
    about = folder / "invented_gpus-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: invented-gpus\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vllm.platform_plugins]\ninvented = invented_gpus:register\n")
    (folder / "invented_gpus.py").write_text('def register():\n    return "invented_platform.InventedGpus"\n')
    (folder / "invented_platform.py").write_text(
        'from vllm.platforms.cpu import CpuPlatform\n\n\nclass InventedGpus(CpuPlatform):\n    ray_device_key = "GPU"\n'
    )


def on_cpu(config: RunConfig, way: str) -> RunConfig:
    """The same run, as its engines must see it to compute on a CPU."""
    cluster = {"device": "cpu", "weight_transfer": way, "threads_per_actor": 1}
    rollout = {"sleep": "never", "max_prompt_tokens": 32, "max_response_tokens": 16, "memory_gib": 0.25}
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update=cluster),
            "rollout": config.rollout.model_copy(update=rollout),
        }
    )


async def canary(worker: Any) -> list[float]:
    """Log-probs from an engine that is ready."""
    await worker.prepare.remote()
    receipt = await worker.confirm.remote(CANARY)
    return [float(value) for value in receipt.canary_logprobs]


async def engine(way: str, logs: Path) -> list[list[float]]:
    """Start the engine, ask, kill it, start it again in the same places, ask."""
    wide = ["cluster=single_gpu", "rollout.tensor_parallel_size=2", "learner.ranks=2"]
    config = load_config(["reward=rule", "run_dir=/nowhere/run", *wide]).config
    shares = gpu_shares(config)
    pool.gpu_shares = lambda config: shares  # type: ignore[attr-defined] # a CPU has none
    bundles = plan_bundles(config, critic_ranks=0, reward_workers=1)
    found = []
    with released(await reserve(config, bundles, SECONDS)) as group:
        place = Placement(group, bundles).of("rollout")
        engines = pool.RolloutPool(on_cpu(config, way), str(model_folder("embedded:policy")), logs, place)
        for _ in range(2):
            await asyncio.wait_for(engines.start(), SECONDS)
            used = ray.available_resources()
            assert [used[key] for key in used if key.startswith("GPU_group_") and key.count("_") == 3] == [0.5, 0.5]
            found.append(await canary(engines.workers[0]))
            ray.kill(engines.workers[0], no_restart=True)
            engines.workers[0] = engines._make(0)
    return found


if __name__ == "__main__":
    ray.init(num_gpus=2, num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    try:
        print(json.dumps(asyncio.run(engine(sys.argv[1], Path(sys.argv[2])))))
    finally:
        ray.shutdown()
