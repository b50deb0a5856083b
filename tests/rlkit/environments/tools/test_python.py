"""The tool `python`: cells in a real sandbox."""

from __future__ import annotations

import asyncio
from typing import Any

from sandbox_fixture import need_bubblewrap

from rlkit.environments.base import Action, Task
from rlkit.environments.tools.environment import Tools
from rlkit.environments.tools.python import Python
from rlkit.experience import ToolCall
from rlkit.rollout.hosts import EpisodeFailedError, InlineHost


def run(*cells: str, step_timeout_seconds: float = 60.0, **options: Any) -> list[str]:
    """What the policy reads after each cell of one episode."""
    need_bubblewrap()
    tools = [{"kind": "python", **options}]
    host = InlineHost(Tools, Tools.Config(tools=tools, placement="inline", step_timeout_seconds=step_timeout_seconds))

    async def episode() -> list[str]:
        await host.start()
        await host.open("1", Task("1"), 0)
        steps = [await host.step("1", Action("", (ToolCall("python", {"code": cell}),))) for cell in cells]
        await host.close("1")
        return [message.content for step in steps for message in step.observation]  # type: ignore[union-attr]

    return asyncio.run(episode())


def test_cells_begin_anew() -> None:
    printed = run(
        "x = 6\nprint('so')\nx * 7",
        "x",
        "```python\nimport sys\nprint('err', file=sys.stderr); print('out')\n```",
        "x = 1",
        "def f():\n    return 1 / 0\nf()",
        "if",
        "print('before'); raise SystemExit(3)",
        "print('before', end=''); import os; os._exit(3)",
        "'ä' + chr(0x1f600)",
    )
    assert printed[0] == "so\n42"
    assert printed[1].splitlines()[-1] == "NameError: name 'x' is not defined"
    assert printed[2] == "out\nerr"
    assert printed[3] == "(nothing was printed)"
    assert 'File "cell 1", line 2, in f' in printed[4] and "    return 1 / 0" in printed[4]
    assert printed[4].endswith("ZeroDivisionError: division by zero") and "solution.py" not in printed[4]
    assert printed[5].endswith("SyntaxError: invalid syntax")
    assert printed[6] == "before\nSystemExit: 3"
    assert printed[7] == "error: the interpreter ended with exit code 3"  # what was not flushed is lost
    assert printed[8] == "'ä😀'"


def test_replay_keeps_names_and_is_not_heard() -> None:
    printed = run(
        "print('first'); x = [1]",
        "x.append(2); print('second'); x",
        "y = x[-1]; z = 1 / 0; y = 0",  # fails half way, as it did the first time
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    n: int\nA(y)",
        "exit()",
        "import os; os._exit(0)",
        "A(sum(x))",
        replay=True,
    )
    assert printed[:2] == ["first", "second\n[1, 2]"]
    assert printed[2].endswith("ZeroDivisionError: division by zero")
    assert printed[3:] == [
        "A(n=2)",
        "(nothing was printed)",
        "error: the interpreter ended with exit code 0",
        "A(n=3)",
    ]


def test_what_hangs_or_prints_for_ever_is_cut_and_not_replayed() -> None:
    printed = run(
        "x = 5",
        "x = 6\nprint('waiting', flush=True)\nwhile True: pass",
        "while True: print('x' * 1000)",
        "x",
        replay=True,
        wall_seconds=1.5,
        output_kib=16,
    )
    assert printed[1] == "waiting\nerror: stopped after 1.5 s"
    assert printed[2].endswith("error: stopped, for it printed more than 16 KiB")
    assert printed[3] == "5"


def test_no_free_sandbox_is_the_environments_failure() -> None:
    need_bubblewrap()
    tools = [{"kind": "python", "processes": 1, "wall_seconds": 60.0, "cpu_seconds": 60}]
    host = InlineHost(Tools, Tools.Config(tools=tools, placement="inline", step_timeout_seconds=2.0))

    async def both() -> list[Any]:
        await host.start()
        for key in "12":
            await host.open(key, Task(key), 0)
        action = Action("", (ToolCall("python", {"code": "while True: pass"}),))
        failures = await asyncio.gather(*(host.step(key, action) for key in "12"), return_exceptions=True)
        for key in "12":
            await host.close(key)
        return failures

    for failure in asyncio.run(both()):
        assert isinstance(failure, EpisodeFailedError)
        assert "raise its processes, or environment.step_timeout_seconds" in str(failure)


def test_a_broken_interpreter_is_found_before_the_run() -> None:
    need_bubblewrap()
    (message,) = Python(python="/nowhere/python").check(30.0)
    assert message.startswith("python: python=/nowhere/python does not run")
    assert "wall_seconds=10 needs environment.step_timeout_seconds above 11.1" in Python().check(10.0)[0]


def test_the_policy_reads_whether_names_live_on() -> None:
    (tool,), (replaying,) = Python().offers(None), Python(replay=True).offers(None)
    assert tool.description.endswith("Each call begins anew.")
    assert replaying.description.endswith("Names live on from call to call.")
    assert list(tool.parameters["properties"]) == ["code"]
