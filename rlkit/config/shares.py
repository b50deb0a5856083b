"""How many GPUs each actor asks Ray for: the one place that knows."""

from __future__ import annotations

from dataclasses import dataclass

from rlkit.config.schema import RunConfig


@dataclass(frozen=True)
class GpuShares:
    """GPUs of one actor of each kind; below 1 a share of one. All 0 on CPU."""

    engine: float
    learner: float
    critic: float
    rewards: float
    """Of all reward workers together."""


def gpu_shares(config: RunConfig) -> GpuShares:
    """`cluster.placement=colocated`: a lone engine, a rank, a critic rank and the rewards fit on one GPU together.

    Ray takes whole numbers only above 1, so an engine over several GPUs has them to itself.
    """
    if config.cluster.device == "cpu":
        return GpuShares(0.0, 0.0, 0.0, 0.0)
    parallel = float(config.rollout.tensor_parallel_size)
    if config.cluster.placement == "apart":
        return GpuShares(parallel, 1.0, 1.0, 1.0)
    return GpuShares(0.5 if parallel == 1 else parallel, 0.3, 0.1, 0.1)
