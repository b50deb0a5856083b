"""Who loads beside whom, and who only after whom: vLLM measures a whole GPU's memory while it finds room for its cache.

Whatever else comes onto this GPU meanwhile is counted as the engine's own, or was free when it looked and is not later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rlkit.config.schema import RunConfig
from rlkit.config.shares import gpu_shares
from rlkit.config.sharing import shares_gpus


def loads_after(config: RunConfig) -> dict[str, list[str]]:
    """For each part that may share a GPU, the parts that must be ready before it begins to load.

    First the sampler, then a reward (its model may be in vLLM, too), then policy and critic. What shares no GPU waits
    for nobody.
    """
    if not shares_gpus(config.cluster):
        return {}
    reward = ["reward"] if gpu_shares(config).rewards > 0 else []
    return {"reward": ["sampler"] if reward else [], "learner": ["sampler", *reward], "critic": ["sampler", *reward]}


def start_in_order(
    starts: Mapping[str, Callable[[], Awaitable[object]]], after: Mapping[str, Sequence[str]]
) -> dict[str, asyncio.Future[None]]:
    """Begin to start all parts, each once those are ready that it comes `after`."""
    starting: dict[str, asyncio.Future[None]] = {}

    async def one(name: str) -> None:
        for other in after.get(name, ()):
            await starting[other]
        await starts[name]()

    starting.update({name: asyncio.ensure_future(one(name)) for name in starts})
    return starting
