"""Entry points inside a sandbox: `start(role, *file descriptors)`. Each reports READY before untrusted code runs."""

from __future__ import annotations

import os
import sys

# A sandbox starts for every run, so import nothing that is not needed before untrusted code runs, not even `typing`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

READY = b'"ready"\n'
"""First message of every process; it shows that the sandbox works."""


def start(role: str, *descriptors: int) -> None:
    """Run one role; jobs come on standard input, and sys.path[0] is the folder of these files."""
    del sys.path[0]
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")  # if memory runs out, the kernel kills this process first
    except OSError:
        pass  # a preference, not a limit
    if sys.flags.no_site:
        import site

        site.setquit()  # because programs call exit()
        site.sethelper()
    roles: dict[str, Callable[..., None]]
    roles = {"program": program, "calls": calls, "solution": solution, "tester": tester}
    roles[role](*descriptors)


def program(results: int, source: int) -> None:
    with open(source, "rb") as file:
        text = file.read()
    os.write(results, READY)
    os.close(results)
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    exec(compile(text, "solution.py", "exec", dont_inherit=True), main.__dict__)


def calls(results: int) -> None:
    from rewards.services.sandbox.inside.solution import answer_calls

    stream = _announce(results)
    answer_calls(_job(), stream)
    _end()


def solution(results: int, requests: int, replies: int) -> None:
    from rewards.services.sandbox.inside.solution import Server

    job = _job()
    _announce(results).close()
    Server(os.fdopen(requests, "rb"), os.fdopen(replies, "wb")).serve(job)
    _end()


def tester(results: int, requests: int, replies: int) -> None:
    from rewards.services.sandbox.inside.tester import run_tests

    job = _job()
    stream = _announce(results)
    run_tests(job, os.fdopen(requests, "wb"), os.fdopen(replies, "rb"), stream)
    _end()


def _job() -> dict[str, Any]:
    import json

    with open(0, "rb", closefd=False) as file:
        job: dict[str, Any] = json.loads(file.read())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # the code's output is discarded
    os.close(null)
    return job


def _announce(results: int) -> BinaryIO:
    stream = os.fdopen(results, "wb")
    stream.write(READY)
    stream.flush()
    return stream


def _end() -> None:
    """End the process without running untrusted code's exit handlers or waiting for its threads."""
    os._exit(0)
