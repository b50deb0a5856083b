"""Where actors go: one Ray placement group, reserved before anything is loaded, so that a run fits or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlkit.config.schema import RunConfig
from rlkit.config.shares import gpu_shares
from rlkit.waiting import WaitedTooLongError, waiting

TOKEN_CPUS = 0.001
"""A bundle must ask for something; CPU time is shared, not reserved."""


Place = Callable[[int], Mapping[str, Any]]
"""Number of an actor of some kind -> what to give to `actor.options`."""


def anywhere(number: int) -> Mapping[str, Any]:
    """Leave it to Ray."""
    return {}


def beside_driver(number: int) -> Mapping[str, Any]:
    """On the driver's node, which is there: Ray itself would take one that has just died, until it notices."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


class NoRoomError(RuntimeError):
    """The cluster cannot hold the run; the message says what was asked for and what there is."""


@dataclass(frozen=True)
class Bundle:
    """Actors that stand on one node together, on the same GPU where they have shares of one."""

    members: tuple[str, ...]
    """`rollout-0`, `learner-0`, ..."""
    gpus: float


def plan_bundles(config: RunConfig, *, critic_ranks: int, reward_workers: int) -> list[Bundle]:
    """Colocated: actors of equal number stand together, rewards dealt out over them; apart: each by itself.

    An engine over several GPUs stands by itself either way.
    """
    shares = gpu_shares(config)
    actors = {
        "rollout": (config.rollout.workers, shares.engine),
        "learner": (config.learner.ranks, shares.learner),
        "critic": (critic_ranks, shares.critic),
        "reward": (reward_workers, shares.rewards / reward_workers),
    }
    apart = config.cluster.placement == "apart"
    together = 0 if apart else max(count for kind, (count, _) in actors.items() if kind != "reward")
    shared: list[list[tuple[str, float]]] = [[] for _ in range(together)]
    alone = []
    for kind, (count, gpus) in actors.items():
        for i in range(count):
            if apart or gpus > 1:
                alone.append(Bundle((f"{kind}-{i}",), gpus))
            else:
                shared[i % together].append((f"{kind}-{i}", gpus))
    return [
        Bundle(tuple(name for name, _ in actors), round(sum(g for _, g in actors), 6)) for actors in shared if actors
    ] + alone


class Placement:
    """A reserved placement group."""

    def __init__(self, group: Any, bundles: list[Bundle]) -> None:
        self._group = group
        self._index = {name: i for i, bundle in enumerate(bundles) for name in bundle.members}

    def of(self, kind: str) -> Place:
        """Where the actors of a kind go."""
        return lambda number: self._options(kind, number)

    def _options(self, kind: str, number: int) -> Mapping[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        index = self._index[f"{kind}-{number}"]
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=index
            )
        }


async def reserve(config: RunConfig, bundles: list[Bundle], seconds: float) -> Any:
    """The placement group, reserved. Raises NoRoomError if Ray has no room for it in time."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = [{"CPU": TOKEN_CPUS, **({"GPU": bundle.gpus} if bundle.gpus else {})} for bundle in bundles]
    group = placement_group(wanted, strategy=config.cluster.strategy)
    try:
        async with waiting("the start", "room for the actors on the cluster", seconds, "ROOM_SECONDS"):
            await group.ready()
    except WaitedTooLongError:
        remove_placement_group(group)
        nodes = [
            f"{node['NodeManagerAddress']}: {node['Resources'].get('GPU', 0):g} GPUs, "
            f"{node['Resources'].get('CPU', 0):g} CPUs"
            for node in ray.nodes()
            if node["Alive"]
        ]
        asked = "; ".join(f"{' + '.join(bundle.members)}: {bundle.gpus:g} GPUs" for bundle in bundles)
        raise NoRoomError(
            f"Ray found no room in {seconds:g} s for {len(bundles)} groups of actors "
            f"(cluster.strategy={config.cluster.strategy}): {asked}. Its nodes: {'; '.join(nodes)}. Lower "
            "rollout.workers, learner.ranks or rollout.tensor_parallel_size, or add nodes"
        ) from None
    return group


@contextmanager
def released(group: Any) -> Iterator[Any]:
    """The group; its reservation is given back at the end."""
    from ray.util.placement_group import remove_placement_group

    try:
        yield group
    finally:
        remove_placement_group(group)
