"""The resources that a run requests from a Ray cluster, and whether the cluster has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlkit.config.parts import ResolvedRun
from rlkit.config.plan import asks_reward, colocated_slots, gpu_shares, shares_gpus


@dataclass(frozen=True)
class Demand:
    """Actors of one kind, or groups of actors that share GPUs."""

    what: str
    count: int
    threads: int
    """Busy CPU threads per actor. Ray does not reserve them: sampler and learner take turns."""
    gpus: float
    """GPUs per actor, on one node. Below 1: a share of a GPU."""


@dataclass(frozen=True)
class Node:
    name: str
    cpus: float
    gpus: float


def demands(run: ResolvedRun) -> list[Demand]:
    """Return what RolloutPool, RankGroup and RewardPool will request from Ray."""
    config, algorithm, gpus = run.config, run.make_algorithm(), gpu_shares(run.config)
    engines, critics = config.rollout.workers, config.critic.ranks if algorithm.needs().critic else 0
    rewards = run.reward_config.workers if asks_reward(config.rollout, algorithm) else 0
    actors = [
        ("vLLM engine", engines, config.cluster.threads_per_actor, gpus.engine),
        ("learner rank", config.learner.ranks, config.cluster.threads_per_actor, gpus.learner),
        ("critic rank", critics, config.cluster.threads_per_actor, gpus.critic),
        ("reward worker", rewards, 1, gpus.rewards / max(1, rewards)),
    ]
    if shares_gpus(config.cluster):
        # An engine and the ranks on its GPUs; a learner's and a critic's rank on a GPU without an engine.
        width = config.rollout.tensor_parallel_size
        actors = [(what, count, threads, 0.0) for what, count, threads, _ in actors]
        actors.append(("colocated group", engines, 0, float(width)))
        actors.append(("colocated group", colocated_slots(config, critics) - engines * width, 0, 1.0))
    return [Demand(*actor) for actor in actors if actor[1]]


def missing(demanded: Sequence[Demand], nodes: Sequence[Node]) -> tuple[list[str], list[str]]:
    """Return what the cluster lacks for the run, and what only slows it down."""
    if not nodes:
        return ["the cluster has no live node"], []
    lacking, slow = [], []
    unplaced = _unplaced(demanded, nodes)
    if unplaced:
        have = ", ".join(f"{node.name}: {node.gpus:g}" for node in nodes)
        asked = ", ".join(f"{d.count} x {d.what} with {d.gpus:g} GPU" for d in demanded if d.gpus)
        lacking.append(
            f"not enough GPUs: no room for {unplaced}. The run asks for {asked}; the cluster has {have}. "
            "Lower rollout.workers, learner.ranks or rollout.tensor_parallel_size, or add nodes"
        )
    threads, cpus = sum(d.count * d.threads for d in demanded), sum(node.cpus for node in nodes)
    if threads > cpus:
        slow.append(f"the run's actors use up to {threads} CPU threads, which share the cluster's {cpus:g} CPUs")
    return lacking, slow


def _unplaced(demanded: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """Return what has no room, in words; the largest are placed first, on the fullest GPUs with room."""
    free = [[1.0] * int(node.gpus) for node in nodes]
    left: dict[str, int] = {}
    for demand in sorted((d for d in demanded if d.gpus), key=lambda d: -d.gpus):
        for _ in range(demand.count):
            if not _take(demand.gpus, free):
                left[demand.what] = left.get(demand.what, 0) + 1
    return ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in left.items())


def _take(gpus: float, free: list[list[float]]) -> bool:
    """Take `gpus` on one node; return False if no node has them. `free`: what is left of each GPU, per node."""
    if gpus >= 1:
        for node in free:
            whole = [i for i, share in enumerate(node) if share == 1.0]
            if len(whole) >= gpus:
                for i in whole[: int(gpus)]:
                    node[i] = 0.0
                return True
        return False
    shares = [(share, node, i) for node in free for i, share in enumerate(node) if share >= gpus - 1e-9]
    if not shares:
        return False
    share, node, i = min(shares, key=lambda candidate: candidate[0])
    node[i] = share - gpus
    return True
