"""Every error that a command explains has one root, and one place prints it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import algorithms
import rewards
import rlkit
from rlkit.config.command import exit_code
from rlkit.config.messages import ConfigError
from rlkit.experience import UserError

NOT_FOR_USERS = {
    "NotInThisStateError",  # a bug of the rollout pool
    "BusyError",  # an answer of the HTTP server
    "WorkerBrokenError",  # an answer of the HTTP server
    "StoppedError",  # a signal: becomes the exit code
    "UnsendableError",  # becomes the reason of an invalid score
    "CannotJudgeError",  # becomes the reason of an invalid score
    "EpisodeFailedError",  # begins again, then becomes the reason of an invalid score
    "RowError",  # becomes a bad row
    *("HttpError", "TransientError", "RefusedError", "OutOfTimeError"),  # who asked a server turns them into reasons
    "ProgramError",  # of an agent that is a program: becomes the reason of an invalid score
    "SolutionError",  # of the program that the sandbox runs
}


def _errors() -> Iterator[type[Exception]]:
    for package in (rlkit, rewards, algorithms):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if issubclass(cls, Exception) and cls.__module__ == module.name and not cls.__name__.startswith("_"):
                    yield cls


def test_errors_for_users_have_one_root() -> None:
    names = {cls.__name__ for cls in _errors() if cls.__name__.endswith("Error") and not issubclass(cls, UserError)}

    assert names <= NOT_FOR_USERS


@pytest.mark.parametrize(("error", "code"), [(UserError("the disk is full"), 1), (ConfigError([]), 2)])
def test_a_command_prints_the_message_alone(error: UserError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    assert exit_code(fail, []) == code
    printed = capsys.readouterr().err
    assert printed.startswith("rlkit: ")
    assert "Traceback" not in printed


def test_other_errors_pass_through() -> None:
    def fail(arguments: list[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_code(fail, [])
