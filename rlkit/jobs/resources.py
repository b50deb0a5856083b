"""What a run asks of a Ray cluster, and whether the cluster has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlkit.config.parts import ResolvedRun
from rlkit.config.plan import colocated_places, gpu_shares, shares_gpus

COLOCATED = "colocated group"
"""An engine and the ranks on its GPUs; a rank, and a critic's, on a GPU without an engine."""


@dataclass(frozen=True)
class Demand:
    """Actors of one kind, or GPUs that several share."""

    what: str
    count: int
    threads: int
    """CPU threads each keeps busy. Ray does not reserve them: sampler and learner take turns."""
    gpus: float
    """Of one node, each. Below 1: a share of a GPU."""


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    name: str
    cpus: float
    gpus: float


def demands(run: ResolvedRun) -> list[Demand]:
    """The actors of the run with what RolloutPool, RankGroup and RewardPool ask Ray for."""
    config, gpus, needs = run.config, gpu_shares(run.config), run.make_algorithm().needs()
    threads, workers = config.cluster.threads_per_actor, run.reward_config.workers
    critics = config.critic.ranks if needs.critic else 0
    found = [
        Demand("vLLM engine", config.rollout.workers, threads, gpus.engine),
        Demand("learner rank", config.learner.ranks, threads, gpus.learner),
        Demand("critic rank", critics, threads, gpus.critic),
        Demand("reward worker", workers, 1, gpus.rewards / workers),
    ]
    if shares_gpus(config.cluster):
        engines, width = config.rollout.workers, config.rollout.tensor_parallel_size
        found = [replace(demand, gpus=0.0) for demand in found]  # they share the GPUs of their places
        found.append(Demand(COLOCATED, engines, 0, float(width)))
        found.append(Demand(COLOCATED, colocated_places(config, critics) - engines * width, 0, 1.0))
    return [demand for demand in found if demand.count]


def missing(wanted: Sequence[Demand], nodes: Sequence[Node]) -> tuple[list[str], list[str]]:
    """What the cluster lacks for the run, and what only makes it slow."""
    if not nodes:
        return ["the cluster has no node that is alive"], []
    lacking, slow = [], []
    unplaced = _unplaced(wanted, nodes)
    if unplaced:
        have = ", ".join(f"{node.name}: {node.gpus:g}" for node in nodes)
        asked = ", ".join(f"{d.count} {d.what}s with {d.gpus:g} each" for d in wanted if d.gpus)
        lacking.append(
            f"not enough GPUs: no room for {unplaced}. The run asks for {asked}; the cluster has {have}. "
            "Lower rollout.workers, learner.ranks or rollout.tensor_parallel_size, or add nodes"
        )
    threads, cpus = sum(d.count * d.threads for d in wanted), sum(node.cpus for node in nodes)
    if threads > cpus:
        slow.append(f"the run's actors use up to {threads} CPU threads, the cluster has {cpus:g} CPUs: they share them")
    return lacking, slow


def _unplaced(wanted: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """Put the largest first onto the fullest GPUs that still have room; what has found no place, in words."""
    free = [[1.0] * int(node.gpus) for node in nodes]
    left: dict[str, int] = {}
    for demand in sorted((d for d in wanted if d.gpus), key=lambda d: -d.gpus):
        for _ in range(demand.count):
            if not _place(demand.gpus, free):
                left[demand.what] = left.get(demand.what, 0) + 1
    return ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in left.items())


def _place(gpus: float, free: list[list[float]]) -> bool:
    """Take that much of one node; False if no node has it."""
    if gpus >= 1:
        for node in free:
            whole = [i for i, share in enumerate(node) if share == 1.0]
            if len(whole) >= gpus:
                for i in whole[: int(gpus)]:
                    node[i] = 0.0
                return True
        return False
    room = [(share, node, i) for node in free for i, share in enumerate(node) if share >= gpus - 1e-9]
    if not room:
        return False
    share, node, i = min(room, key=lambda place: place[0])
    node[i] = share - gpus
    return True
