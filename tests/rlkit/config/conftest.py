"""A user who types commands in a folder of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlkit import train

Typed = Callable[..., str]

REWARDS = "def exact(completions, **columns):\n    return [0.0] * len(completions)\n"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which is also the home, of a user."""
    here = tmp_path / "user"
    (here / "things" / "photos").mkdir(parents=True)
    (here / "empty").mkdir()
    (here / "old").mkdir()
    (here / "old" / "config.yaml").touch()
    (here / "my_rewards.py").write_text(REWARDS)
    rows = "".join(f'{{"question": "What is {n} + 1?", "answer": "{n + 1}"}}\n' for n in range(64))
    (here / "train.jsonl").write_text(rows)
    (here / "copy.jsonl").write_text(rows)
    (here / "one.jsonl").write_text(rows.splitlines()[0])
    (here / "half.jsonl").write_text("\n".join(rows.splitlines()[32:]))
    (here / "long.jsonl").write_text(rows.replace("What", "What in the world " * 200, 1))
    (here / "template.jinja").write_text(TEMPLATE)
    (here / "no_messages.jinja").write_text("{{ prompt }}")
    (here / "broken.jinja").write_text("{% for message in messages %}")
    for name in "abcd":
        (here / "things" / f"{name}.txt").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.syspath_prepend(str(here))
    yield here
    for name in ("my_rewards", "my_data"):
        sys.modules.pop(name, None)


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    def run(*arguments: str) -> str:
        assert train.main([*arguments, "dry_run=true"]) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Output and warnings of a configuration that is right."""

    def run(*arguments: str) -> str:
        code = train.main([*arguments, "dry_run=true"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out + printed.err

    return run
