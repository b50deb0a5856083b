"""Real runs of `environment=tools`: in processes of their own, with files named as they were typed, leaving nothing."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from paths import FIXTURES
from run_fixture import Run
from sandbox_fixture import need_bubblewrap

TOOLS = (
    "environment=tools",
    "model=agent",
    "data=jsonl",
    "data.path=sums.jsonl",
    "reward.accept_last_number=true",
    "verifier=rule",
    "verifier.accept_last_number=true",
    "algorithm=grpo",
    "environment.max_turns=3",
    "rollout.max_prompt_tokens=256",
    "rollout.max_response_tokens=192",
    "trainer.total_steps=2",
    "tracking.sample_groups_per_step=null",
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where the command is typed."""
    rows = [{"question": f"What is {n}*23-{n + 4}?", "answer": str(n * 23 - n - 4)} for n in range(11, 60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def said(run: Run) -> list[str]:
    return [turn["content"] for sample in run.records("samples") for turn in sample["turns"] if turn["role"] == "tool"]


@pytest.mark.slow
def test_python_search_sql_and_calculator_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_bubblewrap()
    (here / "corpus.jsonl").write_text('{"text": "Graz is a city."}\n')
    with sqlite3.connect(here / "shop.db") as connection:
        connection.execute("CREATE TABLE items(name)")
    temporary = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short, for Ray's sockets
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("RAY_TMPDIR", str(temporary))
    tools = (
        "{kind:calculator,name:calc},{kind:python,replay:true},{kind:search,corpus:corpus.jsonl},"
        "{kind:sql,database:shop.db}"
    )
    run = Run(here, *TOOLS, f"environment.tools=[{tools}]", "environment.workers=2", cwd=here)
    try:
        assert run.end() == 0, run.text
    finally:
        run.clean_up()
    steps = [record for record in run.records() if record["kind"] == "step"]
    assert len(steps) == 2 and all(record["reward/failed"] == 0 for record in steps)
    assert any(text.lstrip("-").isdigit() for text in said(run)), "the agent calls `calc`"
    assert "may answer the same actions differently" in run.text
    assert run.left_after(10) == []
    end = time.monotonic() + 20  # the janitor's
    while (left := list(temporary.glob("rlkit-*"))) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []
    shutil.rmtree(temporary)


@pytest.mark.slow
def test_tools_of_a_server(here: Path) -> None:
    server = f"{{kind:mcp,command:[python,{FIXTURES / 'mcp_server.py'},stdio],tools:[calc],deterministic:true}}"
    run = Run(here, *TOOLS, f"environment.tools=[{server}]", cwd=here)
    try:
        assert run.end() == 0, run.text
    finally:
        run.clean_up()
    steps = [record for record in run.records() if record["kind"] == "step"]
    assert len(steps) == 2 and all(record["reward/failed"] == 0 for record in steps)
    assert any(text.lstrip("-").isdigit() for text in said(run)), "the agent calls `calc`"
    assert run.left_after(10) == []
    end = time.monotonic() + 10  # a server ends once whoever spoke to it is gone
    while (
        left := [one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(here)]
    ) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


@pytest.mark.slow
def test_a_tool_that_is_gone_ends_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIXTURE_CALLS", "5")
    command = f"command:[python,{FIXTURES / 'mcp_server.py'},stdio],variables:[FIXTURE_CALLS]"
    run = Run(here, *TOOLS, f"environment.tools=[{{kind:mcp,{command},tools:[calc]}}]", cwd=here)
    try:
        assert run.end() == 1
    finally:
        run.clean_up()
    changed = "have changed since the run began, and its prompts describe the old ones: calc is gone"
    assert changed in " ".join(run.text.split())  # the report is wrapped
    assert run.left_after(10) == []
