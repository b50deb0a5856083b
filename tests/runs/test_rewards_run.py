"""`algorithm=grpo reward=<each>` runs to the end on the real stack; switching needs nothing outside `reward=...`
(and the data that a reward is about)."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fusion_service import Service
from judge_fixture import JudgeServer
from polar_server import FORMATS, fake_server, vllm_server
from run_fixture import Run
from serve_fixture import Server

from rewards.polar.backends import plain_scores
from rlkit.models.folder import model_folder

ROWS = [
    {
        "question": f"Which is larger, {i} or {i + 1}? (A) {i} (B) {i + 1}",
        "answer": "B",
        "options": [str(i), str(i + 1)],
    }
    for i in range(24)
]
TOOLS = [
    {"question": f"Add {i} and 1.", "tool_calls": json.dumps([{"name": "add", "arguments": {"a": i, "b": 1}}])}
    for i in range(24)
]
SORTS = [
    {"question": f"Write a Python function inc that adds {i}.", "tests": [f"assert inc(1) == {i + 1}"]}
    for i in range(24)
]
SCHEMA = {"type": "object", "properties": {"answer": {"type": "number"}}, "required": ["answer"]}


def jsonl(folder: Path, name: str, rows: list[dict[str, Any]], *columns: str) -> tuple[str, ...]:
    """Overrides for a file of rows."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("data=jsonl", f"data.path={file}", *columns)


def needing_nothing(folder: Path) -> dict[str, tuple[str, ...]]:
    """Rewards by name: their overrides, where the folder holds what they need."""
    schema = folder / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    (folder / "my_rewards.py").write_text(
        "def brevity(prompts, completions, **columns):\n    return [-len(c) / 100 for c in completions]\n"
    )
    return {
        "rule": ("reward=rule",),
        "math": ("reward=math",),
        "gsm8k": ("reward=gsm8k",),
        "exact_match": ("reward=exact_match",),
        "regex_match": ("reward=regex_match", "reward.pattern='#### {answer}'"),
        "format": ("reward=format",),
        "length": ("reward=length", "reward.max_tokens=20"),
        "group_length": ("reward=group_length",),
        "repetition": ("reward=repetition",),
        "instructions": ("reward=instructions", "reward.always=[{id:punctuation:no_comma}]"),
        "json_schema": ("reward=json_schema", f"reward.schema_file={schema}"),
        "multiple_choice": (
            "reward=multiple_choice",
            "reward.options_column=options",
            *jsonl(folder, "choices", ROWS, "data.answer_column=answer", "data.heldout_share=0.2"),
        ),
        "tool_call": ("reward=tool_call", *jsonl(folder, "tools", TOOLS, "data.answer_column=null")),
        "polar": ("reward=polar",),
        "polar_vllm": ("reward=polar", "reward.backend=vllm"),
        "implicit_prm": ("reward=implicit_prm", "algorithm=grpo_process"),
        "preference": ("reward=preference", "reward.model_path=embedded:polar", "reward.layout=pair"),
        "code": (
            "reward=code",
            "reward.isolation=bubblewrap",
            *jsonl(folder, "code", SORTS, "data.answer_column=null"),
        ),
        "function": ("reward=function", "reward.function=my_rewards.brevity"),
        "combined": ("reward=[math,polar]", "reward.parts.polar.weight=0.3"),
    }


NAMES = (
    *("rule", "math", "gsm8k", "exact_match", "regex_match", "format", "length", "group_length", "repetition"),
    *("instructions", "json_schema", "multiple_choice", "tool_call", "polar", "polar_vllm", "implicit_prm"),
    *("preference", "function", "combined", "code"),
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def one(*arguments: str) -> Run:
        # `reward=rule` of the small settings comes first: the last choice counts
        runs.append(Run(tmp_path, "algorithm=grpo", *arguments, "trainer.total_steps=2", cwd=tmp_path))
        return runs[-1]

    yield one
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def finished(run: Run) -> None:
    assert run.end() == 0, run.text
    steps = [record for record in run.records() if record["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2], run.text
    assert run.unexplained() == set()
    for step in steps:
        assert math.isfinite(step["reward/mean"])
        assert step["reward/failed"] == 0, run.text
        assert math.isfinite(step["policy/loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_reward_runs_to_the_end(name: str, start: Any, tmp_path: Path) -> None:
    finished(start(*needing_nothing(tmp_path)[name]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pointwise", "pairwise", "listwise"])
def test_a_judge_runs_to_the_end(mode: str, start: Any) -> None:
    with JudgeServer() as server:
        finished(start("reward=judge", f"reward.base_url={server.url}", "reward.model=judge", f"reward.mode={mode}"))
        assert len(server.asked) > 10


@pytest.mark.slow
def test_a_reward_on_a_server_runs_to_the_end(start: Any, tmp_path: Path) -> None:
    server = Server(tmp_path / "server.log", "reward=math")
    try:
        finished(start("reward=remote", f"reward.url={server.ready().url}"))
    finally:
        server.process.terminate()
        server.process.wait(30)


@pytest.mark.slow
def test_code_in_a_sandbox_service_runs_to_the_end(start: Any, tmp_path: Path) -> None:
    service = Service()
    thread = threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        rows = jsonl(tmp_path, "code", SORTS, "data.answer_column=null")
        # the embedded policy fences nothing; without the fence all it writes is run as a program
        finished(
            start(
                "reward=code", "reward.isolation=http", f"reward.url={service.url}", "reward.require_fence=false", *rows
            )
        )
        assert len(service.requests) > 16, "programs of the policy were sent, not only the self-test"
    finally:
        service.shutdown()
        service.server_close()
        thread.join(10)


@pytest.mark.slow
def test_polar_on_a_vllm_server_runs_to_the_end(start: Any, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with vllm_server(log) as (url, _):
        finished(start("reward=polar", "reward.backend=http_vllm", f"reward.urls=[{url}]", "reward.dtype=float32"))
    assert log.read_text().count("POST /pooling") > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_polar_on_other_servers_runs_to_the_end(kind: str, start: Any) -> None:
    folder, one_at_a_time = model_folder("embedded:polar"), threading.Lock()

    def scores(rows: Any) -> list[float]:
        with one_at_a_time:  # two threads that load models side by side leave transformers without tied weights
            return plain_scores(folder, "cpu", "float32", rows)

    with fake_server(kind, scores) as server:
        finished(start("reward=polar", f"reward.backend={kind}", f"reward.urls=[{server.url}]", "reward.dtype=float32"))
        assert sum(len(body[server.key]) for body in server.bodies) > 10
