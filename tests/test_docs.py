"""Every command in the README and the docs parses and validates, so that none goes stale."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_fixture import need
from command_server import CommandServer
from paths import PYTHONPATH, ROOT
from ray_fixture import HANGS_SECONDS
from sandbox_fixture import need_bubblewrap

from benchmarks.structure import core_path
from examples.embedded_models.remake import _options
from rlkit.report import parser as report_parser
from rlkit.view.__main__ import parser as view_parser

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.partition(" #")[0].strip()) for line in lines if line.strip()]
    return found


FILES = {
    "questions.jsonl": {"question": "Which? (A) 1 (B) 2", "answer": "B", "choices": ["1", "2"]},
    "train.jsonl": {"question": "What is 1 + 2?", "answer": "1 + 2 = 3 #### 3"},
    "test.jsonl": {"question": "What is 2 + 5?", "answer": "2 + 5 = 7 #### 7"},
    "pairs.jsonl": {"prompt": "What is 1 + 2?", "chosen": "1 + 2 = 3", "rejected": "1 + 2 = 4"},
    "responses.jsonl": [
        {"prompt": "What is 1 + 2?", "completion": "3", "label": True},
        {"prompt": "What is 1 + 2?", "completion": "4", "label": False},
    ],
    "chat.jsonl": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    "hard.jsonl": {"question": "What is 11 * 12?", "answer": "132"},
    "calls.jsonl": {
        "question": "Add 1 and 2.",
        "answer": "3",
        "tool_calls": '[{"name": "add", "parameters": {"a": 1}}]',
    },
    "ifeval.jsonl": {"prompt": "Hi", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "schema.json": {"type": "object"},
    "corpus.jsonl": {"text": "Graz is a city."},
    "requests.jsonl": {
        "question": "What is the size?",
        "answer": "3",
        "facts": {"size": "It is 3."},
        "subgoals": ["The size is asked for.", "It is told."],
    },
    "reward_bench_2.jsonl": {
        "id": "What:1",
        "prompt": "What is 1 + 2?",
        "chosen": ["3"],
        "rejected": ["4"],
        "subset": "Math",
    },
    "spider.jsonl": {"question": "What is 1 + 2?", "answer": "3", "db_id": "shop"},
}
"""Files that commands of the docs name: a row of each, or some."""


def numbered(row: dict[str, Any], i: int) -> dict[str, Any]:
    """Rows that ask the same are one question, and of one question none can be held out."""
    text = json.dumps(row)
    for asked in ("What", "Which", "Add", "Hi"):
        text = text.replace(f'"{asked}', f'"{i}. {asked}')
    numbered_row: dict[str, Any] = json.loads(text)
    return numbered_row


@pytest.fixture(scope="module")
def server() -> Iterator[CommandServer]:
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user might type the commands: with the files they name, and the shared data beside it."""
    if (ROOT / "../shared").is_dir():
        (tmp_path / "shared").symlink_to((ROOT / "../shared").resolve())
    folder = tmp_path / "here"
    folder.mkdir()
    for name, row in FILES.items():
        several = row if isinstance(row, list) else [row]
        rows = several if name.endswith(".json") else [numbered(several[i % len(several)], i) for i in range(40)]
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    with contextlib.closing(sqlite3.connect(folder / "shop.db")) as connection:
        connection.execute("CREATE TABLE items(name, price)")
    for run in ("runs/x", "runs/y_evaluated", "runs/NAME"):
        _run_of_two_checkpoints(folder / run)
    (folder / "my_rewards.py").write_text("def brevity(prompts, completions, **columns):\n    return [0.0]\n")
    for page in PAGES:
        for name, code in re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            (folder / name).write_text(code)
    return folder


def _run_of_two_checkpoints(run: Path) -> None:
    for step in (30, 60):
        (run / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        (run / f"checkpoints/step_{step:06d}/policy").symlink_to(ROOT / "rlkit/embedded/policy")
    (run / "config.yaml").write_text("model: {path: 'embedded:policy'}\nrollout: {max_prompt_tokens: 640}\n")
    (run / "samples.jsonl").write_text('{"response": "3"}\n')


def test_what_is_not_run_says_why() -> None:
    for page in PAGES:
        blocks = re.findall(r"(.*)\n```console\n", page.read_text())
        assert all(re.fullmatch(r" *<!-- not run: .+ -->", line) for line in blocks), f"{page}: {blocks}"


OTHERWISE = {
    r"make [\w-]+$": "tests/test_docs.py",
    r"source \.venv/bin/activate$": "Makefile",
    r"rlkit doctor$": "tests/test_packaging.py",
    r"rlkit (view|report) ": "tests/test_docs.py",
    r"python -m rlkit\.submit ": "tests/test_docs.py",
    r"python -m rlkit\.(sync|export) ": "tests/rlkit/trackers/test_sync.py",
    r"python -m rlkit\.train environment=verifiers ": "tests/runs/test_verifiers_run.py",
    r"python -m examples\.embedded_models\.remake": "tests/test_docs.py",
    r"ALGORITHM=": "tests/test_docs.py",
}
"""Commands that are not dry runs -> what looks at them."""


def validated() -> list[tuple[str, str]]:
    """Commands whose configuration can be checked without running them."""
    modules = "train|train_reward|sft|serve|evaluate|generate|rescore"
    own = {
        command: page for page, command in commands() if re.match(rf"(python -m rlkit\.|rlkit )({modules}) ", command)
    }
    return [(page, command) for command, page in own.items() if not any(re.match(rule, command) for rule in OTHERWISE)]


@pytest.mark.parametrize(("page", "command"), validated())
def test_commands_validate(page: str, command: str, folder: Path, server: CommandServer) -> None:
    if "../shared" in command and not (ROOT / "../shared/data").is_dir():
        pytest.skip("needs ../shared/data beside the project")
    if "isolation=bubblewrap" in command or "kind:python" in command:
        need_bubblewrap()
    for package in re.findall(r"\w=(reasoning_gym|gymnasium|textarena|gem|skyrl_gym)\b", command):
        need(package)
    for package in re.findall(r"wandb|mlflow|trackio|swanlab", command):
        need(package)
    if ".lora." in command:
        need("peft", "lora")
    module, *arguments = shlex.split(command.replace("python -m rlkit.", "rlkit ", 1))[1:]
    module = f"rlkit.{module}"
    if "--help" not in arguments:
        named = "run_dir=" in command or module in ("rlkit.serve", "rlkit.rescore")
        arguments += ["dry_run=true", *([] if named else [f"run_dir={folder / 'run'}"])]
    with contextlib.ExitStack() as servers:  # of judges and models: that one listens is checked
        for port in set(re.findall(r"//(?:127\.0\.0\.1|localhost):(\d+)", command)):
            servers.enter_context(socket.create_server(("127.0.0.1", int(port)), reuse_port=True))
        code, said = server.run(module, arguments, folder, 120)
    assert code == 0, f"{page}: {command}\n{said}"


def test_every_command_is_looked_at() -> None:
    dry = {command for _, command in validated()}
    rest = {command for _, command in commands()} - dry
    rules = {command: [rule for rule in OTHERWISE if re.match(rule, command)] for command in rest}
    assert {command for command, own in rules.items() if len(own) != 1} == set()
    assert {rule for own in rules.values() for rule in own} == set(OTHERWISE)
    for file in OTHERWISE.values():
        assert (ROOT / file).exists()


def typed(pattern: str) -> list[list[str]]:
    """The words of the commands that begin with this, each once."""
    return [shlex.split(command) for command in dict(reversed(row) for row in commands()) if re.match(pattern, command)]


def test_commands_of_the_page_parse() -> None:
    parsers = {"view": view_parser, "report": report_parser}
    lines = typed("rlkit (view|report) ")
    assert len(lines) >= 5
    for _, command, *arguments in lines:
        parsers[command]().parse_args(arguments)


def test_commands_of_examples_are_understood() -> None:
    lines = typed(r"python -m examples\.embedded_models\.remake")
    assert len(lines) >= 4
    for line in lines:
        _options(line[3:])


@pytest.mark.parametrize("line", typed(r"python -m rlkit\.submit "), ids=" ".join)
def test_jobs_are_right_but_for_the_cluster(line: list[str], folder: Path, server: CommandServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    arguments = [word.replace(":8265", f":{port}") for word in line[3:]]
    code, said = server.run("rlkit.submit", arguments, folder, 120)
    assert code == 1 and "no Ray dashboard answers (connection refused)" in said, said
    assert said.count("rlkit:") == 1


@pytest.mark.slow
def test_the_contract_of_an_algorithm_of_the_docs(folder: Path) -> None:
    (words,) = typed("ALGORITHM=")
    options = dict(word.split("=", 1) for word in words[: words.index("python")])
    environment = {**os.environ, **options, "PYTHONPATH": os.pathsep.join([str(folder), PYTHONPATH])}
    command = [sys.executable, *words[words.index("python") + 1 :]]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for _, line in commands() for word in re.findall(r"^make ([\w-]+)", line)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_linked_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            made = "reference/" in target  # by docs/making/pages.py; tests/test_site.py builds the site
            assert made or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_other_modules_named_in_commands_exist() -> None:
    for page, command in commands():
        for module in re.findall(r"python -m (rlkit[.\w]*)", command):
            path = ROOT / module.replace(".", "/")
            files = path.with_suffix(".py"), path / "__main__.py"
            assert any(file.exists() for file in files), f"{page}: {command}"
        for script in re.findall(r"python ((?:benchmarks|examples)/\S+\.py)", command):
            assert (ROOT / script).exists(), f"{page}: {command}"


def test_the_layers_of_the_design_are_those_that_lint_checks() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "layers"]
    section = (ROOT / "docs/design.md").read_text().partition("## Layers\n```\n")[2].partition("\n```")[0]
    assert section.splitlines() == layers


def test_the_core_path_of_the_readme_exists_and_stays_short() -> None:
    files = core_path(ROOT)
    assert len(files) > 15
    assert sum(len(file.read_text().splitlines()) for file in files) <= 4300
