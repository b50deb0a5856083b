"""Processes of environments: what hangs, dies or lies costs its own episode alone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rlkit.environments.base import Action, EnvironmentConfig, Step, Task
from rlkit.experience import UserError
from rlkit.rollout.environment_processes import ProcessHost
from rlkit.rollout.hosts import EpisodeFailedError
from tests.fixtures.chaos import Chaos

TARGET = "tests.fixtures.chaos.Chaos"


@asynccontextmanager
async def running(folder: Path, target: str = TARGET, **options: Any) -> AsyncIterator[ProcessHost]:
    config = EnvironmentConfig(**{"step_timeout_seconds": 0.4, **options})
    host = ProcessHost(target, Chaos, config, folder / "environment.log", startup=30.0)
    try:
        await host.start()
        yield host
    finally:
        await host.stop()


def with_host(folder: Path, work: Callable[[ProcessHost], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        async with running(folder, **options) as host:
            return await work(host)

    return asyncio.run(run())


async def opened(host: ProcessHost, *keys: str) -> None:
    for key in keys:
        await host.open(key, Task(key), seed=7)


async def failure(work: Awaitable[Any]) -> EpisodeFailedError:
    with pytest.raises(EpisodeFailedError) as caught:
        await work
    return caught.value


def pid_of(step: Step) -> int:
    (message,) = step.observation  # type: ignore[misc]
    return int(message.content.split()[-1])  # type: ignore[union-attr]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_an_episode_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        (opening,) = await host.open("a", Task("t"), seed=7)
        assert opening.content == "seed 7"
        step = await host.step("a", Action("fine"))
        assert step.reward == 1.0 and pid_of(step) != os.getpid()
        await host.close("a")
        await host.close("a")

    with_host(tmp_path, work)


HANGS = ("sleep_in_c", "hang_in_c", "spin", "await_long")


@pytest.mark.parametrize(
    "word", [pytest.param(word, marks=[pytest.mark.slow] * (word in ("sleep_in_c", "spin"))) for word in HANGS]
)
def test_a_step_that_hangs_fails_alone(tmp_path: Path, word: str) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a", "b")
        hung, other = await asyncio.gather(
            failure(host.step("a", Action(word))), host.step("b", Action("fine")), return_exceptions=True
        )
        assert isinstance(hung, EpisodeFailedError) and hung.kind == "timeout" and not hung.innocent
        assert "step_timeout_seconds=0.4" in hung.details
        if isinstance(other, BaseException):  # it waited behind the one that hung
            assert isinstance(other, EpisodeFailedError) and other.innocent
        for key in ("a", "b"):
            await host.close(key)
        await opened(host, "b again")
        assert (await host.step("b again", Action("fine"))).reward == 1.0

    with_host(tmp_path, work)


def test_steps_that_wait_behind_slow_ones_are_not_late(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        keys = [f"{i}" for i in range(8)]
        await opened(host, *keys)
        steps = await asyncio.gather(*(host.step(key, Action("slow 0.3")) for key in keys))
        assert len(steps) == 8  # 2.4 s in all, each within its 0.4 s

    with_host(tmp_path, work)


def test_a_process_that_dies_fails_the_step_it_was_busy_with(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a", "b")
        assert (await failure(host.step("a", Action("exit")))).kind == "died"
        between = await failure(host.step("b", Action("fine")))
        assert between.kind == "died" and between.innocent

    with_host(tmp_path, work)


def test_an_answer_that_was_given_survives_its_process(tmp_path: Path) -> None:
    """However long it is."""

    async def work(host: ProcessHost) -> None:
        await opened(host, "a", "b")
        answer, died = await asyncio.gather(
            host.step("a", Action("ten_megabytes")), failure(host.step("b", Action("exit"))), return_exceptions=True
        )
        assert isinstance(answer, Step) and isinstance(died, EpisodeFailedError)
        assert died.kind == "died" and not died.innocent

    with_host(tmp_path, work, step_timeout_seconds=20)


def test_a_process_that_dies_between_steps_may_be_any_episodes_doing(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a", "b")
        await host.step("a", Action("exit_later 0.05"))
        await asyncio.sleep(0.6)
        for key in ("a", "b"):
            assert not (await failure(host.step(key, Action("fine")))).innocent

    with_host(tmp_path, work)


@pytest.mark.slow
def test_a_process_that_hangs_between_steps_is_replaced(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a")
        await host.step("a", Action("hang_later 0.01"))
        await asyncio.sleep(0.1)
        hung = await failure(host.step("a", Action("fine")))
        assert hung.kind == "timeout" and not hung.innocent
        await host.close("a")
        await opened(host, "b")
        assert (await host.step("b", Action("fine"))).reward == 1.0

    with_host(tmp_path, work)


def test_a_forked_process_takes_no_call_and_gives_no_answer(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a")
        for _ in range(3):
            (said,) = (await host.step("a", Action("fork"))).observation  # type: ignore[misc]
            assert said.content == "parent"  # type: ignore[union-attr]
        steps = [await host.step("a", Action("fine")) for _ in range(50)]
        assert len({pid_of(step) for step in steps}) == 1

    with_host(tmp_path, work, step_timeout_seconds=10)


def test_children_of_a_hung_step_are_killed_with_it(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a")
        await failure(host.step("a", Action(f"fork_and_hang {tmp_path / 'pid'}")))

    with_host(tmp_path, work)
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("word", "kind", "words"),
    [
        ("fail", "failure", "the server is away"),
        ("crash", "exception", "ZeroDivisionError"),
        ("wrong", "not_finite", "reward of a Step is nan"),
        ("unsendable", "wrong_type", "function"),
        ("no_such_method", "exception", "AttributeError"),
    ],
)
def test_what_goes_wrong_is_named(tmp_path: Path, word: str, kind: str, words: str) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a", "b")
        error = await failure(host.step("a", Action(word)))
        assert error.kind == kind and words in error.details
        assert (await host.step("b", Action("fine"))).reward == 1.0

    with_host(tmp_path, work)


def test_ten_megabytes_arrive(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> int:
        await opened(host, "a")
        (message,) = (await host.step("a", Action("ten_megabytes"))).observation  # type: ignore[misc]
        return len(message.content)  # type: ignore[union-attr]

    assert with_host(tmp_path, work, step_timeout_seconds=20) == 10 * 2**20


def test_episodes_are_spread_and_wait_for_room(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None:
        await opened(host, "a", "b")
        pids = [pid_of(await host.step(key, Action("fine"))) for key in ("a", "b")]
        assert pids[0] != pids[1]
        waiting = asyncio.create_task(host.open("c", Task("c"), seed=1))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await host.close("b")
        await waiting
        assert pid_of(await host.step("c", Action("fine"))) == pids[1]

    with_host(tmp_path, work, workers=2, concurrency=1, step_timeout_seconds=10)


def test_one_that_cannot_be_prepared_says_why(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> None: ...

    with pytest.raises(
        UserError, match=r"environment: Chaos, process 0 cannot be prepared: NotFoundError: .*environment\.0"
    ):
        with_host(tmp_path, work, target="tests.fixtures.chaos.Missing")


def test_nothing_is_left_after_the_end(tmp_path: Path) -> None:
    async def work(host: ProcessHost) -> int:
        await opened(host, "a")
        return pid_of(await host.step("a", Action("fine")))

    assert gone(with_host(tmp_path, work))
