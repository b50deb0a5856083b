"""How many GPUs each actor asks Ray for: the one place that knows."""

from __future__ import annotations

from dataclasses import dataclass

from rlkit.config.parts import import_part
from rlkit.config.schema import RunConfig


@dataclass(frozen=True)
class GpuShares:
    """GPUs of one actor of each kind; below 1 a share of one. All 0 on CPU."""

    engine: float
    """Apart: all GPUs of one engine. Colocated: its share of each GPU that it has."""
    learner: float
    critic: float
    rewards: float
    """Of all reward workers together; 0 for a reward that loads no model here (a program, a server's client)."""


def gpu_shares(config: RunConfig) -> GpuShares:
    """`cluster.placement=colocated`: an engine, a rank, a critic rank and the rewards fit on one GPU together."""
    if config.cluster.device == "cpu":
        return GpuShares(0.0, 0.0, 0.0, 0.0)
    judged = _reward_uses_gpu(config)
    if config.cluster.placement == "apart":
        return GpuShares(float(config.rollout.tensor_parallel_size), 1.0, 1.0, 1.0 if judged else 0.0)
    return GpuShares(0.5, 0.3, 0.1, 0.1 if judged else 0.0)


def colocated_places(config: RunConfig, critic_ranks: int) -> int:
    """How many places colocated actors have, on CUDA a GPU each: enough for every engine's GPUs and for every rank."""
    return max(config.rollout.workers * config.rollout.tensor_parallel_size, config.learner.ranks, critic_ranks)


def _reward_uses_gpu(config: RunConfig) -> bool:
    cls = import_part("reward", config.reward["_target_"])
    own = {key: value for key, value in config.reward.items() if key != "_target_"}
    return bool(cls.uses_gpu(cls.Config(**own)))
