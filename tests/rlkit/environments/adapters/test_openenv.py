"""`environment=openenv`, against servers of the real package in an interpreter of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from adapter_fixture import SESSIONS, openenv_servers  # noqa: F401

from rlkit.environments.adapters.openenv import OpenEnv, OpenEnvConfig
from rlkit.environments.base import Action, EnvironmentContext, EnvironmentFailure, Step, Task, settled
from rlkit.experience import ToolCall, UserError

pytestmark = pytest.mark.slow


def prepared(url: str, **options: Any) -> tuple[OpenEnvConfig, EnvironmentContext]:
    config = OpenEnvConfig(url=url, **options)
    shared = OpenEnv.prepare(config)
    return config, EnvironmentContext(OpenEnv.tools(config, shared), shared)


def play(url: str, *actions: Action, **options: Any) -> tuple[str, list[Step]]:
    """What an episode says first, and its answers."""
    config, context = prepared(url, **options)

    async def episode() -> tuple[str, list[Step]]:
        environment = OpenEnv(config, context)
        try:
            opening = await environment.reset(Task("", columns={"seed": 3}), 0)
            return opening, [await settled(environment.step(action)) for action in actions]
        finally:
            await environment.close()

    return asyncio.run(episode())


def test_a_game_to_its_end(openenv_servers: dict[str, str]) -> None:  # noqa: F811
    opening, steps = play(openenv_servers["game"], *(Action(f" {number}\n") for number in range(1, 17)))
    assert opening == "Guess my number."
    rewards = [step.reward for step in steps if step.done]
    number = next(i for i, step in enumerate(steps) if step.done)
    assert rewards == [1.0] and [step.observation for step in steps[:number]] == ["higher"] * number
    assert all(step.success is None for step in steps)
    assert play(openenv_servers["game"], Action("1"), options={"largest": 1})[1][0].done, "options reach reset"


def test_what_the_policy_says_wrong_it_reads(openenv_servers: dict[str, str]) -> None:  # noqa: F811
    _, (words,) = play(openenv_servers["game"], Action("seven"))
    assert words.observation == "error: say a whole number alone"
    answers = [
        Action("no braces"),
        Action('{"piece": 1'),
        Action('I move {"piece": "king", "steps": 2}.'),
        Action('{"piece": "king", "steps": "far"}'),
    ]
    _, (none, cut, good, wrong) = play(openenv_servers["pair"], *answers, observation_field="text")
    assert none.observation == "error: say a JSON object with piece, steps"
    assert str(cut.observation).startswith("error: this is not JSON")
    assert (good.observation, good.reward) == ("king 2", 0.5)
    assert str(wrong.observation).startswith("error: steps: Input should be a valid integer")


def test_a_servers_tools(openenv_servers: dict[str, str]) -> None:  # noqa: F811
    _, context = prepared(openenv_servers["tools"])
    (add,) = context.tools
    assert (add.name, add.description, set(add.parameters["properties"])) == ("add", "Add two numbers.", {"a", "b"})
    calls = [
        Action("", (ToolCall("add", {"a": 2, "b": 3}),)),
        Action("", (ToolCall("add", {"a": 2, "c": 3}),)),
        Action("5"),
    ]
    _, (five, wrong, answer) = play(openenv_servers["tools"], *calls)
    assert [message.content for message in five.observation] == ["5"]  # type: ignore[union-attr]
    assert "error" in wrong.observation[0].content  # type: ignore[union-attr,index]
    assert answer.done


def test_the_servers_faults_are_not_the_policys(openenv_servers: dict[str, str]) -> None:  # noqa: F811
    with pytest.raises(EnvironmentFailure, match="EXECUTION_ERROR: broken"):
        play(openenv_servers["game"], Action("99"))
    with pytest.raises(EnvironmentFailure, match="observation_field=board: there is text"):
        play(openenv_servers["game"], observation_field="board")
    with pytest.raises(UserError, match="action_field=move: the fields of the server's actions: number"):
        prepared(openenv_servers["game"], action_field="move")
    with pytest.raises(UserError, match="no OpenEnv server answers"):
        prepared("http://127.0.0.1:9")


def test_more_episodes_than_the_server_has_sessions_wait_or_fail(openenv_servers: dict[str, str]) -> None:  # noqa: F811
    config, context = prepared(openenv_servers["game"], step_timeout_seconds=4.0)
    task = Task("", columns={"seed": 3})

    async def crowd() -> None:
        first = [OpenEnv(config, context) for _ in range(SESSIONS)]
        for one in first:
            await one.reset(task, 0)
        with pytest.raises(EnvironmentFailure, match="lower environment"):
            await OpenEnv(config, context).reset(task, 0)
        late = OpenEnv(config, context)
        waiting = asyncio.create_task(late.reset(task, 0))
        await asyncio.sleep(0.3)
        for one in first:
            await one.close()
        assert await waiting == "Guess my number."
        await late.close()

    asyncio.run(crowd())
