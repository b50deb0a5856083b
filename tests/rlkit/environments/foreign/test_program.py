"""Commands as agents: real processes, through the host that runs environments."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rlkit.environments.agent import Endpoint
from rlkit.environments.base import Step, Task
from rlkit.environments.foreign.program import Program
from rlkit.experience import Message
from rlkit.rollout.environment_processes import ProcessHost
from rlkit.rollout.hosts import EpisodeFailedError
from tests.rlkit.rollout.test_endpoint import CALLS, Table

MODEL = Endpoint("http://127.0.0.1:9/sessions/x/v1", "x", "policy")
TASK = Task("t-1", (Message("user", "2+2?"),), answer="4", columns={"level": 3})
WINS = """echo '{"reward": 1}'"""


def host_of(folder: Path, *command: str, **options: Any) -> ProcessHost:
    config = Program.Config(command=command, **{"step_timeout_seconds": 20, **options})
    return ProcessHost("rlkit.environments.foreign.program.Program", Program, config, folder / "log", 60.0)


def with_host(host: ProcessHost, work: Callable[[ProcessHost], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        await host.start()
        try:
            return await work(host)
        finally:
            await host.stop()

    return asyncio.run(run())


async def played(host: ProcessHost, key: str = "a") -> Step:
    await host.open(key, TASK, seed=7)
    return await host.step(key, MODEL)


def step_of(folder: Path, script: str, **options: Any) -> Step:
    step: Step = with_host(host_of(folder, "sh", "-c", script, **options), played)
    return step


def failure_of(folder: Path, script: str, **options: Any) -> EpisodeFailedError:
    with pytest.raises(EpisodeFailedError) as caught:
        step_of(folder, script, **options)
    return caught.value


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def pids(file: Path) -> list[int]:
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def test_a_program_gets_its_task_the_policy_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json, os, sys; print('thinking'); task = json.load(sys.stdin); seen = dict(os.environ); "
        f"json.dump([task, seen, os.getcwd(), os.listdir()], open({str(tmp_path / 'seen')!r}, 'w')); "
        """print('{"reward": 0.25, "success": false, "metrics": {"calls": 2}}')"""
    )
    monkeypatch.setenv("SECRET_TOKEN", "s")
    monkeypatch.setenv("SEARCH_KEY", "k")
    host = host_of(tmp_path, sys.executable, "-c", code, variables=("SEARCH_KEY",))
    step = with_host(host, played)
    assert (step.reward, step.success, step.metrics) == (0.25, False, {"calls": 2.0})
    task, seen, folder, files = json.loads((tmp_path / "seen").read_text())
    messages = [{"role": "user", "content": "2+2?"}]
    assert task == {
        "id": "t-1", "messages": messages, "answer": "4", "references": [], "columns": {"level": 3}, "seed": 7,
    }  # fmt: skip
    assert (seen["OPENAI_BASE_URL"], seen["OPENAI_API_KEY"], seen["OPENAI_MODEL"]) == (MODEL.base_url, "x", "policy")
    assert seen["SEARCH_KEY"] == "k" and seen["PATH"] and "127.0.0.1" in seen["NO_PROXY"]
    assert not {"SECRET_TOKEN", "PYTHONPATH", "RAY_ADDRESS"} & set(seen) and files == []
    assert not Path(folder).exists() and folder != str(Path.cwd())


def test_what_a_program_says_last_is_its_reward(tmp_path: Path) -> None:
    flood = "head -c 30000000 /dev/zero | tr '\\0' 'x'; head -c 30000000 /dev/zero >&2; echo; "
    assert step_of(tmp_path, flood + WINS).reward == 1.0
    assert step_of(tmp_path, "exec cat", prints_reward=False) == Step(())


@pytest.mark.parametrize(
    ("script", "kind", "why"),
    [
        ("echo no key >&2; exit 3", "exception", "ProgramError: exit code 3: no key"),
        ("kill -9 $$", "exception", "ProgramError: signal SIGKILL"),
        ("echo done", "exception", "its last line should be"),
        ("true", "exception", "environment.prints_reward=false"),
        ("""echo '{"reward": 1, "sucess": true}'""", "exception", "sucess Extra inputs"),
        ("""echo '{"reward": "1"}'""", "exception", "reward Input should be a valid number"),
        ("""echo '{"reward": NaN}'""", "exception", "is '{\"reward\": NaN}'"),
    ],
)
def test_a_program_that_fails_says_how(script: str, kind: str, why: str, tmp_path: Path) -> None:
    failed = failure_of(tmp_path, script)
    assert failed.kind == kind and why in failed.details, failed.details


def test_at_its_deadline_a_program_ends_with_all_it_started_and_alone(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    script = f"read task; sleep 99 & echo $$ $! >> {file}; case $task in *quick*) {WINS};; *) wait; esac"

    async def work(host: ProcessHost) -> None:
        slow = asyncio.create_task(played(host, "a"))
        await host.open("b", Task("quick"), seed=7)
        assert (await host.step("b", MODEL)).reward == 1.0
        with pytest.raises(EpisodeFailedError) as caught:
            await slow
        assert str(caught.value) == "timeout: no answer within environment.step_timeout_seconds=6"
        await until(lambda: len(pids(file)) == 4 and not any(map(runs, pids(file))))
        await host.open("c", Task("quick"), seed=7)
        assert (await host.step("c", MODEL)).reward == 1.0

    with_host(host_of(tmp_path, "sh", "-c", script, step_timeout_seconds=6), work)


def test_programs_end_with_the_process_of_their_environment_and_leave_no_files(tmp_path: Path) -> None:
    file, place = tmp_path / "pids", tmp_path / "place"
    script = f"pwd > {place}; touch mine; echo $PPID $$ >> {file}; sh -c 'echo $$ >> {file}; while :; do :; done'"

    async def work(host: ProcessHost) -> None:
        playing = asyncio.create_task(played(host))
        await until(lambda: len(pids(file)) == 3)
        os.kill(pids(file)[0], signal.SIGKILL)
        with pytest.raises(EpisodeFailedError) as caught:
            await playing
        assert caught.value.kind == "died"
        await until(lambda: not any(map(runs, pids(file))))
        await until(lambda: not Path(place.read_text().strip()).exists())

    with_host(host_of(tmp_path, "sh", "-c", script), work)


def test_a_spent_budget_is_the_policys_doing_though_the_program_fails(tmp_path: Path) -> None:
    code = (
        "import json, os, urllib.request as u\n"
        "said = [{'role': 'user', 'content': '2+2?'}]\n"
        "while True:\n"
        "    body = json.dumps({'model': os.environ['OPENAI_MODEL'], 'messages': said}).encode()\n"
        "    call = u.Request(os.environ['OPENAI_BASE_URL'] + '/chat/completions', body)\n"
        "    answer = json.load(u.urlopen(call))['choices'][0]['message']\n"
        "    said += [answer, {'role': 'user', 'content': 'Sure?'}]\n"
    )
    sample = Table("4", "5").play(host=host_of(tmp_path, sys.executable, "-c", code), max_turns=2)
    assert sample.episode is not None and (sample.episode.ended, sample.episode.success) == ("turns", False)
    assert [span.role for span in sample.spans] == ["assistant", "user", "assistant"]
    failed = Table(CALLS).play(host=host_of(tmp_path, "sh", "-c", "exit 3"), retries=0)
    assert failed.episode is not None and failed.episode.failure == "exception: ProgramError: exit code 3"


def test_mistakes_are_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("agent.py").touch()
    config = Program.Config(command=("sh", "agent.py", "-v"), variables=("NO_SUCH_KEY",))
    assert config.command == ("sh", str(tmp_path / "agent.py"), "-v"), "it works in another folder"
    assert ["NO_SUCH_KEY is not set" in message for message in Program.check(config)] == [True]
    (message,) = Program.check(Program.Config(command=("./agent.py",)))
    assert message.startswith(f"environment.command: {tmp_path / 'agent.py'} is not a program here")
