"""Interpreters without what is wanted. With the package: tests/runs/test_verifiers_run.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.environments.foreign.verifiers import Verifiers


def test_an_interpreter_without_the_package_is_named_with_the_remedy() -> None:
    config = Verifiers.Config(python=sys.executable, id="my_sums", variables=("NO_SUCH_KEY",))
    missing, message = Verifiers.check(config)
    assert "NO_SUCH_KEY is not set" in missing
    assert message.startswith("environment.id=my_sums: ") and "-m pip install 'verifiers>=0.3.1,<0.5'" in message


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Verifiers.Config(python="venv/bin/python", id="my_sums")
    assert config.python == str(tmp_path / "venv/bin/python"), "processes may work elsewhere"
    (message,) = Verifiers.check(config)
    assert f"{config.python} is not a program; run python -m venv {tmp_path / 'venv'}" in message


def test_the_configuration_says_it_at_once(tmp_path: Path) -> None:
    words = ("environment=verifiers", f"environment.python={tmp_path}/python", "environment.id=x", "model=agent")
    with pytest.raises(ConfigError, match=r"environment\.python: .* is not a program"):
        load_config([*words, f"run_dir={tmp_path / 'run'}"])
