"""Where actors are placed, and in which order they load.

One placement group is reserved before anything loads. Actors on the same GPU load one after another, because vLLM
measures the whole GPU's memory to size its cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlkit.cluster.waiting import WaitedTooLongError, waiting
from rlkit.config.plan import colocated_slots, gpu_shares, shares_gpus
from rlkit.config.schema import RunConfig
from rlkit.experience import UserError

TOKEN_CPUS = 0.001
"""A bundle must request something; CPU time is shared, not reserved."""
BUNDLES = "VLLM_RAY_BUNDLE_INDICES"
"""vLLM's variable for the bundles of an engine's workers, one bundle each."""


Place = Callable[[int], Mapping[str, Any]]
"""Index of an actor of one kind -> arguments of `actor.options`."""


def anywhere(number: int) -> Mapping[str, Any]:
    return {}


def beside_driver(number: int) -> Mapping[str, Any]:
    """Place on the driver's node, which is alive: Ray may pick one whose death it has not noticed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


class NoRoomError(UserError):
    """Raised if actors do not fit; the message says what was requested and what is available."""


@dataclass(frozen=True)
class Bundle:
    """Actors on one node; on the same GPU if they have shares of one."""

    members: tuple[str, ...]
    """`rollout-0`, `learner-0`, ... An engine on several GPUs is a member of several bundles."""
    gpus: float


def plan_bundles(config: RunConfig, *, critic_ranks: int, reward_workers: int) -> list[Bundle]:
    """Return the bundles. Colocated: ranks with the same number share one; engine i of t GPUs has bundles i*t to
    i*t + t-1; rewards are spread.

    On CUDA each bundle is a whole GPU: Ray might put two part-GPU bundles on one. Apart: one bundle per actor.
    """
    counts = {"learner": config.learner.ranks, "critic": critic_ranks, "reward": reward_workers}
    if config.cluster.placement == "apart":
        shares = gpu_shares(config)
        of_reward = round(shares.rewards / max(1, reward_workers), 6)
        gpus = {"learner": shares.learner, "critic": shares.critic, "reward": of_reward}
        engines = [Bundle((f"rollout-{i}",), shares.engine) for i in range(config.rollout.workers)]
        return engines + [Bundle((f"{kind}-{i}",), gpus[kind]) for kind, count in counts.items() for i in range(count)]
    width = config.rollout.tensor_parallel_size
    together: list[list[str]] = [[] for _ in range(colocated_slots(config, critic_ranks))]
    for i in range(config.rollout.workers * width):
        together[i].append(f"rollout-{i // width}")
    for kind, count in counts.items():
        for i in range(count):
            together[i % len(together)].append(f"{kind}-{i}")
    return [Bundle(tuple(members), 1.0 if config.cluster.device == "cuda" else 0.0) for members in together]


def on_one_node(bundles: int, wide: Sequence[Sequence[int]], nodes: Sequence[str]) -> list[int]:
    """Map our bundles to Ray's, with each of `wide` (one actor's bundles) on one node. Raises NoRoomError."""
    left: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        left.setdefault(node, []).append(index)
    order: dict[int, int] = {}
    for indices in wide:
        free = next((free for free in left.values() if len(free) >= len(indices)), None)
        if free is None:
            per_node = ", ".join(f"{nodes.count(node)}" for node in left)
            raise NoRoomError(
                f"Ray reserved {bundles} GPUs on {len(left)} nodes ({per_node}), but {len(wide)} engines of "
                f"{len(indices)} GPUs (rollout.workers, rollout.tensor_parallel_size) do not fit there, each on one "
                "node. Try cluster.strategy=STRICT_PACK, fewer engines, or nodes whose free GPUs are a multiple of "
                "rollout.tensor_parallel_size"
            )
        order.update(zip(indices, free, strict=False))
        del free[: len(indices)]
    rest = iter([index for unused in left.values() for index in unused])
    return [order[index] if index in order else next(rest) for index in range(bundles)]


class Placement:
    def __init__(self, group: Any, bundles: list[Bundle]) -> None:
        """Assign bundles. Raises NoRoomError if the GPUs of an engine cannot be on one node."""
        self._group = group
        self._index: dict[str, list[int]] = {}
        for index, bundle in enumerate(bundles):
            for name in bundle.members:
                self._index.setdefault(name, []).append(index)
        wide = [indices for indices in self._index.values() if len(indices) > 1]
        if wide:
            from ray.util.placement_group import placement_group_table

            nodes = placement_group_table(group)["bundles_to_node_id"]
            order = on_one_node(len(bundles), wide, [nodes[index] for index in range(len(bundles))])
            self._index = {name: [order[index] for index in indices] for name, indices in self._index.items()}

    def of(self, kind: str) -> Place:
        return lambda number: self._options(kind, number)

    def _options(self, kind: str, number: int) -> Mapping[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        indices = self._index[f"{kind}-{number}"]
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=indices[0]
        )
        if len(indices) == 1:
            return {"scheduling_strategy": strategy}
        # The actor itself uses no GPU; vLLM, inside it, starts an actor in each of these bundles of its group.
        environment = {"env_vars": {BUNDLES: ",".join(map(str, indices))}}
        return {"scheduling_strategy": strategy, "num_gpus": 0, "runtime_env": environment}


async def reserve(config: RunConfig, bundles: list[Bundle], seconds: float) -> Any:
    """Reserve a placement group. Raises NoRoomError if Ray finds no room in time."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    requests = [{"CPU": TOKEN_CPUS, **({"GPU": bundle.gpus} if bundle.gpus else {})} for bundle in bundles]
    group = placement_group(requests, strategy=config.cluster.strategy)
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
    from ray.util.placement_group import remove_placement_group

    try:
        yield group
    finally:
        remove_placement_group(group)


def loads_after(config: RunConfig) -> dict[str, list[str]]:
    """Return, for each component that may share a GPU, those that must be ready before it loads: sampler, reward,
    learner, critic."""
    if not shares_gpus(config.cluster):
        return {}
    reward = ["reward"] if gpu_shares(config).rewards > 0 else []
    return {"reward": ["sampler"] if reward else [], "learner": ["sampler", *reward], "critic": ["sampler", *reward]}


def start_in_order(
    starts: Mapping[str, Callable[[], Awaitable[object]]], after: Mapping[str, Sequence[str]]
) -> dict[str, asyncio.Future[None]]:
    """Return a running future per component; each starts once those it comes `after`, if started at all, are ready."""
    futures: dict[str, asyncio.Future[None]] = {}

    async def start(name: str) -> None:
        for other in after.get(name, ()):
            if other in futures:
                await futures[other]
        await starts[name]()

    futures.update({name: asyncio.ensure_future(start(name)) for name in starts})
    return futures


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For actors without a share of a GPU: Ray leaves the variable unchanged for them, and code that asks for a GPU would
run on the first one, next to an engine."""
