"""The environment of tools: what it offers, who answers, how it ends; and the calculator."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.environments.base import Action, EnvironmentContext, Step, Task
from rlkit.environments.tool import tool
from rlkit.environments.tools.calculator import shown, value
from rlkit.environments.tools.environment import Tools
from rlkit.environments.tools.mcp import Mcp
from rlkit.environments.tools.search import Search
from rlkit.environments.tools.sql import Sql
from rlkit.experience import ToolCall
from rlkit.rollout.hosts import InlineHost

TASK = Task("1", columns={"db_id": "shop"})


def play(
    tools: list[Any], *calls: tuple[str, Mapping[str, Any]], task: Task = TASK, cls: type[Tools] = Tools
) -> list[str]:
    """What the policy reads, in one episode with a call a turn."""
    host = InlineHost(cls, cls.Config(tools=tools, placement="inline"))

    async def episode() -> list[str]:
        await host.start()
        await host.open("1", task, 0)
        steps = [await host.step("1", Action("", (ToolCall(name, arguments),))) for name, arguments in calls]
        await host.close("1")
        return [message.content for step in steps for message in step.observation]  # type: ignore[union-attr]

    return asyncio.run(episode())


def test_an_answer_ends_the_episode_and_earns_nothing_here() -> None:
    config = Tools.Config(tools=["calculator"])
    environment = Tools(config, EnvironmentContext(Tools.tools(config, [None]), [None]))
    assert environment.reset(TASK, 0) is None
    assert environment.step(Action("42")) == Step(done=True)


def test_tools_have_the_names_and_words_that_are_chosen() -> None:
    config = Tools.Config(tools=["calculator", {"kind": "calculator", "name": "calc", "description": "Sums."}])
    first, second = Tools.tools(config, [None, None])
    assert (first.name, second.name, second.description) == ("calculator", "calc", "Sums.")
    assert first.description.startswith("Work out an arithmetic expression")
    assert second.schema()["function"]["parameters"]["required"] == ["expression"]
    assert play(["calculator"], ("calculator", {"expression": "6*7"})) == ["42"]
    calc: list[Any] = [{"kind": "calculator", "name": "calc"}]
    assert play(calc, ("calc", {"expression": "6*7"}), ("calculator", {"expression": "1"})) == [
        "42",
        "error: there is no tool 'calculator'; there are calc",
    ]


class Shop(Tools):
    def reset(self, task: Task, seed: int) -> str:
        super().reset(task, seed)
        return "What is it?"

    @tool
    def price(self, item: str) -> str:
        """Look up a price."""
        return str({"tea": 3}[item])


def test_a_subclass_adds_tools_of_its_own() -> None:
    calls = [("price", {"item": "tea"}), ("price", {"item": "car"}), ("calculator", {"expression": "3*2"})]
    assert play(["calculator"], *calls, cls=Shop) == ["3", "error: KeyError: 'car'", "6"]
    clash = Shop.Config(tools=[{"kind": "calculator", "name": "price"}])
    assert Shop.check(clash) == ["price is the name of two tools; give one of them another name: {kind:...,name:...}"]


def test_two_databases_by_two_names(tmp_path: Path) -> None:
    for name in ("cities", "shop"):
        with sqlite3.connect(tmp_path / f"{name}.db") as connection:
            connection.execute(f"CREATE TABLE {name}(n)")
    tools = [{"kind": "sql", "name": name, "database": str(tmp_path / f"{name}.db")} for name in ("cities", "shop")]
    query = {"query": "SELECT name FROM sqlite_master"}
    assert play(tools, ("cities", query), ("shop", query)) == ["name\ncities", "name\nshop"]


def test_configuration(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "Graz"}) + "\n")
    chosen = f"environment.tools=[calculator,{{kind:search,corpus:{corpus},documents:2}}]"
    common = ["environment=tools", "reward=rule", "model=agent", f"run_dir={tmp_path / 'run'}"]
    run = load_config([*common, chosen])
    assert run.environment_class is Tools and run.environment_config is not None
    assert run.environment_config == Tools.Config(
        **{k: v for k, v in run.config.environment.items() if k != "_target_"}
    )
    assert run.environment_config.tools[1].documents == 2  # type: ignore[attr-defined]
    for wrong, message in {
        "environment=tools": "environment.tools: needs a value",
        "environment.tools=[calculater]": "calculater",
        "environment.tools=[{kind:search,corpus:nowhere.jsonl}]": "nowhere.jsonl cannot be read",
        "environment.tools=[{kind:search,corpse:a.jsonl}]": "corpse",
        "environment.tools=[{kind:sql,database:nowhere.db}]": f"there is no database {Path.cwd()}/nowhere.db",
        "environment.tools=[{kind:sql,database:'{db_id}.db'}]": "Tools needs db_id with every prompt",
        "environment.tools=[calculator,calculator]": "calculator is the name of two tools",
        "environment.tools=[{kind:python,wall_seconds:40}]": "environment.step_timeout_seconds above 44.4",
    }.items():
        with pytest.raises(ConfigError, match="environment") as error:
            load_config([*common, wrong])
        assert message in str(error.value)


def test_files_are_those_of_where_the_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of where a worker runs."""
    (tmp_path / "corpus.jsonl").write_text('{"text": "Graz"}\n')
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("CREATE TABLE items(n)")
    monkeypatch.chdir(tmp_path)
    tools = "{kind:search,corpus:corpus.jsonl},{kind:sql,database:shop.db},{kind:mcp,command:[cat]}"
    run = load_config(
        ["environment=tools", f"environment.tools=[{tools}]", "reward=rule", "model=agent", "run_dir=run"]
    )
    monkeypatch.chdir("/")
    search, sql, mcp = Tools.Config(**{k: v for k, v in run.config.environment.items() if k != "_target_"}).tools
    assert isinstance(search, Search) and search.corpus == tmp_path / "corpus.jsonl"
    assert isinstance(sql, Sql) and sql.database == str(tmp_path / "shop.db")
    assert isinstance(mcp, Mcp) and mcp.folder == tmp_path


def test_whether_answers_repeat_is_said() -> None:
    assert Tools.deterministic(Tools.Config(tools=["calculator", {"kind": "sql", "database": "a"}]))
    assert not Tools.deterministic(Tools.Config(tools=["calculator", "python"]))
    assert Tools.deterministic(Tools.Config(tools=[{"kind": "search", "corpus": "a"}]))
    assert not Tools.deterministic(Tools.Config(tools=[{"kind": "search", "url": "http://h:1/retrieve"}]))
    with pytest.raises(ValidationError, match="not both"):
        Tools.Config(tools=[{"kind": "search", "corpus": "a", "url": "http://h:1"}])


# -- calculator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("17*23-45", "346"),
        ("2^10 - 2**3", "1016"),
        ("2^3+1", "9"),  # a power binds more tightly than a sum, as in mathematics
        ("-2^2", "-4"),
        ("0.1+0.2", "0.3"),
        ("6/2", "3"),
        ("7//2 + 7%4", "6"),
        ("1/3", "0.333333333333"),
        ("10^20", "100000000000000000000"),
        ("sqrt(2)^2", "2"),
        ("max(1, 2.5) + abs(-1)", "3.5"),
        ("comb(5, 2) * factorial(3)", "60"),
        ("round(2*pi, 2)", "6.28"),
        ("log(e^3)", "3"),
        ("2^-1", "0.5"),
        ("round(12345, -2) + round(2.5)", "12302"),
    ],
)
def test_arithmetic(expression: str, result: str) -> None:
    assert shown(value(expression)) == result


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__",
        "[1][0]",
        "'a'*10**9",
        "9**9**9",
        "10**5000",
        "factorial(100000)",
        "round(5, -100000000)",
        "factorial(3.5)",
        "(lambda: 1)()",
        "1 if 1 else 2",
        "1 < 2",
        "True + 1",
        "1j",
        "(-8)**(1/3)",
        "1/0",
        "sqrt(-1)",
        "1e308*10",
        "1e999",
        "what",
        "sin()",
        "round(1, n=2)",
        "(" * 400 + "1" + ")" * 400,
        "1+" * 600 + "1",
        "",
        "2 2",
    ],
)
def test_what_is_no_arithmetic_is_for_the_policy_to_read(expression: str) -> None:
    (said,) = play(["calculator"], ("calculator", {"expression": expression}))
    assert said.startswith("error: ") and len(said) < 400


def test_numbers_stay_small_enough_to_be_shown() -> None:
    assert math.log10(int(shown(value("2^9999")))) < 4000
