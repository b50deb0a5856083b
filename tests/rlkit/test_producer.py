"""Waiting beside the producer."""

from __future__ import annotations

import asyncio

import pytest

from rlkit.producer import until


def test_waiting_for_groups_ends_with_the_producers_own_error() -> None:
    class RewardBroke(RuntimeError):
        pass

    async def fails() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(raise_later())

    async def raise_later() -> None:
        await asyncio.sleep(0.01)
        raise RewardBroke("the verifier is gone")

    async def wait_for_it() -> None:
        await until(asyncio.Event().wait(), asyncio.create_task(fails()))

    with pytest.raises(RewardBroke, match="the verifier is gone"):
        asyncio.run(wait_for_it())
