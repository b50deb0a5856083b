"""The tool `mcp`: a real server over standard input and output, and over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from pydantic import ValidationError

from rlkit.cluster.processes import free_port
from rlkit.environments.base import Action, Task
from rlkit.environments.tool import ToolsChangedError
from rlkit.environments.tools.environment import Tools
from rlkit.environments.tools.mcp import Mcp
from rlkit.experience import ToolCall, UserError
from rlkit.rollout.environment_processes import ProcessHost
from rlkit.rollout.hosts import EpisodeFailedError, Host, InlineHost

FIXTURE = str(ROOT / "tests/fixtures/mcp_server.py")
STDIO = {"kind": "mcp", "command": [sys.executable, FIXTURE, "stdio"]}
TARGET = "rlkit.environments.tools.environment.Tools"


def serving(port: int, *options: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, FIXTURE, "http", str(port), *options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise TimeoutError("the server does not start")


@pytest.fixture(scope="module")
def http() -> Iterator[dict[str, Any]]:
    port = free_port()
    process = serving(port)
    yield {"kind": "mcp", "url": f"http://127.0.0.1:{port}/mcp"}
    process.kill()
    process.wait()


@pytest.fixture(params=["stdio", "http"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return STDIO if request.param == "stdio" else request.getfixturevalue("http")


def hosted(options: Mapping[str, Any], seconds: float = 20.0) -> InlineHost:
    return InlineHost(Tools, Tools.Config(tools=[options], placement="inline", step_timeout_seconds=seconds))


async def said(host: Host, key: str, name: str, **arguments: Any) -> str:
    step = await host.step(key, Action("", (ToolCall(name, arguments),)))
    (message,) = step.observation
    content: str = message.content  # type: ignore[union-attr]
    return content


async def opened(host: Host, *keys: str) -> None:
    await asyncio.gather(*(host.open(key, Task(key), 0) for key in keys))


async def repeatedly(work: Callable[[], Awaitable[Any]]) -> None:
    """News of changed tools travel beside the calls, and so does that of a process's death."""
    for _ in range(100):
        with contextlib.suppress(EpisodeFailedError):
            await work()
        await asyncio.sleep(0.05)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def test_tools_are_listed_and_called(options: dict[str, Any]) -> None:
    async def episode() -> None:
        host = hosted(options)
        await host.start()
        by_name = {tool.name: tool for tool in host.tools}
        assert list(by_name) == sorted(by_name) and {"add", "fail", "wait"} <= set(by_name)
        assert by_name["add"].description == "Add two numbers."
        assert by_name["add"].parameters["required"] == ["a"]
        await opened(host, "1")
        assert await said(host, "1", "add", a=2, b=3) == "5"
        assert await said(host, "1", "add", a=2) == "3"
        assert await said(host, "1", "nothing") == "(nothing was returned)"
        shown = (await said(host, "1", "show")).splitlines()
        assert shown == [
            "a picture:",
            "(image, image/png, 5 bytes)",
            "(resource notes: file:///notes)",
            "inside",
            "(resource file:///b, audio/wav, 3 bytes)",
        ]
        assert len(await said(host, "1", "letters", count=3_000_000)) == 3_000_000
        began = time.monotonic()
        await opened(host, *"abcdefgh")
        assert await asyncio.gather(*(said(host, key, "wait", seconds=0.5) for key in "abcdefgh")) == ["waited"] * 8
        assert time.monotonic() - began < 3  # one after the other: 4
        await host.close("1")

    asyncio.run(episode())


def test_what_the_policy_did_wrong_it_reads(options: dict[str, Any]) -> None:
    async def episode() -> None:
        host = hosted(options)
        await host.start()
        await opened(host, "1")
        assert await said(host, "1", "add", a="x") == "error: $.a: 'x' is not of type 'integer'"
        assert await said(host, "1", "add") == "error: $: 'a' is a required property"
        assert await said(host, "1", "fail", how="tool") == "error: Error executing tool fail: no such item"
        assert (await said(host, "1", "fail", how="crash")).startswith("error: Error executing tool fail")
        assert (await said(host, "1", "subtract")).startswith("error: there is no tool 'subtract'")
        with pytest.raises(EpisodeFailedError, match=r"failure: mcp: .*call of fail: .*the disk is full"):
            await said(host, "1", "fail", how="protocol")
        await host.close("1")
        await opened(host, "2")  # which the failure cost nothing
        assert await said(host, "2", "add", a=1) == "2"

    asyncio.run(episode())


def test_some_tools_under_other_names() -> None:
    async def episode() -> None:
        host = hosted({**STDIO, "name": "sums", "tools": ["add", "letters"]})
        await host.start()
        assert [tool.name for tool in host.tools] == ["sums_add", "sums_letters"]
        await opened(host, "1")
        assert await said(host, "1", "sums_add", a=1) == "2"
        with pytest.raises(UserError, match="has no tool subtract"):
            await hosted({**STDIO, "tools": ["subtract"]}).start()

    asyncio.run(episode())
    two = Tools.Config(tools=[{**STDIO, "tools": ["add"]}] * 2)
    assert Tools.check(two)[0].startswith("add is the name of two tools")


@pytest.mark.slow
@pytest.mark.parametrize("per_episode", [False, True])
def test_state_of_an_episode(options: dict[str, Any], per_episode: bool) -> None:
    async def episodes() -> list[str]:
        host = hosted({**options, "per_episode": per_episode})
        await host.start()
        await opened(host, "1", "2")
        heard = [await said(host, key, "remember", word=word) for key, word in [("1", "a"), ("2", "b"), ("1", "c")]]
        await host.close("1")
        await host.close("2")
        return heard

    heard = [re.fullmatch(r"(.*) in (\d+)", text) for text in asyncio.run(episodes())]
    words, processes = zip(*((match[1], int(match[2])) for match in heard if match), strict=True)
    if per_episode:
        assert words == ("a", "b", "a c")
    if "command" in options:
        assert len(set(processes)) == (2 if per_episode else 1) and all(map(gone, processes))


@pytest.mark.slow
def test_a_server_without_sessions_has_none_for_an_episode() -> None:
    port = free_port()
    process = serving(port, "stateless")
    options = {"kind": "mcp", "url": f"http://127.0.0.1:{port}/mcp", "per_episode": True}
    with pytest.raises(UserError, match="per_episode has no effect"):
        asyncio.run(hosted(options).start())
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_hung_server_costs_its_callers_and_is_replaced() -> None:
    async def episodes() -> None:
        host = hosted(STDIO, seconds=8.0)
        await host.start()
        await opened(host, "1", "2")
        first = int((await said(host, "1", "remember", word="a")).split()[-1])
        with pytest.raises(EpisodeFailedError, match=r"failure: .*call of hang: no answer within 7.2 s"):
            await said(host, "1", "hang")
        await host.close("1")
        assert int((await said(host, "2", "remember", word="b")).split()[-1]) != first
        assert await asyncio.to_thread(gone, first)

    asyncio.run(episodes())


@pytest.mark.slow
@pytest.mark.parametrize("per_episode", [False, True])
def test_a_server_that_dies_is_started_again(per_episode: bool) -> None:
    async def episodes() -> None:
        host = hosted({**STDIO, "per_episode": per_episode})
        await host.start()
        await opened(host, "1", "2")
        before = await said(host, "2", "remember", word="a")
        with pytest.raises(EpisodeFailedError, match=r"failure: mcp: .*call of die"):
            await said(host, "1", "die")
        await host.close("1")
        after = await said(host, "2", "remember", word="b")
        assert (before.split()[-1] == after.split()[-1]) == per_episode  # the other episode has its own
        await opened(host, "3")
        assert await said(host, "3", "add", a=1) == "2"
        for key in "23":
            await host.close(key)

    asyncio.run(episodes())


@pytest.mark.slow
def test_a_server_may_take_longer_to_come_back_than_a_call_may_wait(tmp_path: Path) -> None:
    again = tmp_path / "again"
    script = f"test -e {again} && sleep 8; touch {again}; exec {sys.executable} {FIXTURE} stdio"

    async def episodes() -> None:
        host = hosted({"kind": "mcp", "command": ["sh", "-c", script]}, seconds=5.0)
        await host.start()
        keys = list("12345678")
        await opened(host, *keys)
        with pytest.raises(EpisodeFailedError, match="call of die"):
            await said(host, keys.pop(), "die")
        waited = 0
        while True:
            with contextlib.suppress(EpisodeFailedError):
                assert await said(host, keys.pop(), "add", a=1) == "2"
                break
            waited += 1
        assert waited

    asyncio.run(episodes())


@pytest.mark.slow
def test_a_server_of_http_that_comes_back() -> None:
    port = free_port()
    process = serving(port)

    async def episodes() -> None:
        nonlocal process
        host = hosted({"kind": "mcp", "url": f"http://127.0.0.1:{port}/mcp"})
        await host.start()
        await opened(host, "1")
        process.kill()
        process.wait()
        with pytest.raises(EpisodeFailedError, match="failure: mcp: http://127"):
            await said(host, "1", "add", a=1)
        process = await asyncio.to_thread(serving, port)
        await opened(host, "2")
        assert await said(host, "2", "add", a=1) == "2"

    asyncio.run(episodes())
    process.kill()
    process.wait()


@pytest.mark.slow
def test_tools_that_change_under_way_end_the_run() -> None:
    async def episodes() -> None:
        for options in ({}, {"per_episode": True}):
            host = hosted({**STDIO, **options})
            await host.start()
            await opened(host, "1")
            assert await said(host, "1", "change") == "changed"
            with pytest.raises(ToolsChangedError, match=r"have changed since the run began.*another is new"):
                await repeatedly(lambda: said(host, "1", "add", a=1))  # noqa: B023
            await host.close("1")
        chosen = hosted({**STDIO, "tools": ["add", "change"]})  # others are not of interest
        await chosen.start()
        await opened(chosen, "1")
        assert await said(chosen, "1", "change") == "changed"
        await asyncio.sleep(1)
        assert await said(chosen, "1", "add", a=1) == "2"

    asyncio.run(episodes())


@pytest.mark.slow
def test_tools_of_a_new_process_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the processes of an environment: a session of another episode, and a process that replaces another."""
    more = tmp_path / "more"
    monkeypatch.setenv("FIXTURE_TOOLS", str(more))
    tools = [{**STDIO, "variables": ["FIXTURE_TOOLS"]}]

    async def episodes() -> None:
        host = ProcessHost(TARGET, Tools, Tools.Config(tools=tools), tmp_path / "environment.log", startup=60.0)
        await host.start()
        assert "add" in [tool.name for tool in host.tools]
        await opened(host, "1")
        assert await said(host, "1", "environment", variable="FIXTURE_TOOLS") == str(more)
        server = int((await said(host, "1", "remember", word="a")).split()[-1])
        more.write_text("more")
        with pytest.raises(EpisodeFailedError, match=r"failure: .*call of die"):
            await said(host, "1", "die")
        with pytest.raises(ToolsChangedError, match="more is new"):
            await said(host, "1", "add", a=1)
        (worker,) = host._workers
        assert worker is not None and gone(server)
        worker.process.kill()
        await host.close("1")
        with pytest.raises(ToolsChangedError, match=r"process 0 has different tools .*more is new"):
            await repeatedly(lambda: opened(host, "2"))
        await host.stop()

    asyncio.run(episodes())


@pytest.mark.slow
def test_a_killed_process_leaves_no_server(tmp_path: Path) -> None:
    """Not even one that hangs, whose standard input closes unnoticed."""

    async def episodes() -> list[int]:
        host = ProcessHost(TARGET, Tools, Tools.Config(tools=[STDIO]), tmp_path / "environment.log", startup=60.0)
        await host.start()
        await opened(host, "1", "2")
        pid = int((await said(host, "1", "remember", word="a")).split()[-1])
        guard = int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])  # type: ignore[index]
        hanging = asyncio.create_task(said(host, "1", "hang"))
        await asyncio.sleep(0.5)
        await host.stop()  # kills
        hanging.cancel()
        return [pid, guard]

    for pid in asyncio.run(episodes()):
        assert gone(pid)


@pytest.mark.slow
def test_secrets_are_read_from_the_environment(http: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3")
    monkeypatch.setenv("KEY", "k3")

    async def heard(options: Mapping[str, Any], *names: str) -> list[str]:
        host = hosted(options)
        await host.start()
        await opened(host, "1")
        return [await said(host, "1", "environment", variable=name) for name in names]

    sent = {**http, "token_variable": "SECRET", "header_variables": {"x-key": "KEY"}}
    assert asyncio.run(heard(sent, "authorization", "x-key")) == ["Bearer s3", "k3"]
    assert asyncio.run(heard({**STDIO, "variables": ["KEY"]}, "SECRET", "KEY")) == ["None", "k3"]


def test_problems_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Mcp(**STDIO).check(30.0) == []
    assert Mcp(command=("no-such-program",)).check(30.0) == [
        "mcp: there is no program no-such-program to start the server"
    ]
    monkeypatch.chdir(tmp_path)
    assert Mcp(command=("python",)).folder == tmp_path
    assert Mcp(url="http://h/mcp", token_variable="NO_SUCH").check(30.0) == [
        "mcp: the environment variable NO_SUCH is not set"
    ]
    monkeypatch.setattr("rlkit.environments.tools.mcp.metadata.version", lambda name: "1.9.2")
    assert Mcp(**STDIO).check(30.0)[0].startswith("mcp: needs the package mcp: install rlkit with its extra")
    for wrong, why in {
        (): "needs command",
        (("url", "http://h"), ("command", ("a",))): "not both",
        (("url", "h:1"),): "must be an address",
        (("url", "http://a:b@h"),): "a secret belongs in",
        (("url", "http://h"), ("variables", ("A",))): "variables has no effect with url",
        (("command", ("a",)), ("token_variable", "A")): "token_variable has no effect with command",
        (("command", ("a",)), ("description", "d")): "the server describes its tools",
    }.items():
        with pytest.raises(ValidationError, match=why):
            Mcp(**dict(wrong))
    assert not Mcp(**STDIO).repeats() and Mcp(**STDIO, deterministic=True).repeats()


@pytest.mark.slow
def test_what_is_no_server(tmp_path: Path) -> None:
    for command, why in {(sys.executable, "-c", ""): "Connection closed", ("cat",): ""}.items():
        with pytest.raises(UserError, match=f"mcp: {re.escape(command[0])}.*{why}"):
            asyncio.run(asyncio.wait_for(hosted({"kind": "mcp", "command": command}).start(), 30))
    url = f"http://127.0.0.1:{free_port()}/mcp"
    with pytest.raises(UserError, match=f"mcp: {url}: ConnectError"):
        asyncio.run(hosted({"kind": "mcp", "url": url}).start())
