"""A program that plays many episodes: asked side by side, started again when it ended."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from paths import ROOT

from rlkit.environments.base import EnvironmentFailure
from rlkit.environments.foreign import bridge as module
from rlkit.environments.foreign.bridge import Bridge
from rlkit.environments.foreign.process import ProgramError
from rlkit.experience import UserError


def with_bridge(work: Callable[[Bridge], Awaitable[None]], **purpose: Any) -> None:
    async def run() -> None:
        bridge = Bridge("the shop", [sys.executable, str(ROOT / "tests/fixtures/bridged.py")], os.environ, purpose)
        await bridge.start()
        try:
            await work(bridge)
        finally:
            with pytest.raises(EnvironmentFailure):
                await bridge.ask({"does": "end"})

    asyncio.run(run())


def asking(bridge: Bridge, does: str) -> asyncio.Task[Mapping[str, Any]]:
    return asyncio.create_task(bridge.ask({"does": does}))  # type: ignore[arg-type]


def test_many_are_asked_at_once_and_answered_in_any_order() -> None:
    async def work(bridge: Bridge) -> None:
        held = [asking(bridge, "hold") for _ in range(3)]
        with pytest.raises(ProgramError, match="KeyError: 'x'"):
            await bridge.ask({"does": "fail"})
        released = await bridge.ask({"does": "release"})
        assert released["held"] == 3
        assert [(await one)["number"] for one in held] == [1, 2, 3]

    with_bridge(work)


def test_one_that_ended_says_why_and_is_started_again() -> None:
    async def work(bridge: Bridge) -> None:
        held = asking(bridge, "hold")
        await asyncio.sleep(0)
        for one in (held, asking(bridge, "end")):
            with pytest.raises(EnvironmentFailure, match=r"the shop ended, exit code 1: starting\nout of memory"):
                await one
        assert (await bridge.ask({"does": "release"}))["held"] == 0

    with_bridge(work)


def test_a_cancelled_episode_costs_the_program_only_if_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNWINDING_SECONDS", 0.5)

    async def cancelled(one: asyncio.Task[Any]) -> None:
        await asyncio.sleep(0.1)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one

    async def work(bridge: Bridge) -> None:
        other = asking(bridge, "hold")
        await cancelled(asking(bridge, "hold"))
        await asyncio.sleep(1.0)
        assert not other.done() and (await bridge.ask({"does": "release"}))["held"] == 2 and (await other)
        other = asking(bridge, "hold")
        await cancelled(asking(bridge, "hang"))
        with pytest.raises(EnvironmentFailure, match="the shop ended, signal SIGKILL"):
            await other
        assert (await bridge.ask({"does": "release"}))["held"] == 0

    with_bridge(work)


@pytest.mark.parametrize(
    ("purpose", "why"),
    [
        ({"error": "no such set"}, "no such set"),
        ({"broken": True}, "the shop ended during startup, exit code 1: .*no data"),
    ],
)
def test_one_that_cannot_start_says_why(purpose: Any, why: str) -> None:
    with pytest.raises(UserError, match=f"(?s){why}"):
        with_bridge(lambda bridge: asyncio.sleep(0), **purpose)
