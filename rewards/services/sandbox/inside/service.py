"""Entry point inside a service that runs one program and returns its standard output."""

from __future__ import annotations

import ctypes
import io
import json
import os
import subprocess
import sys
import tempfile
from typing import Any, BinaryIO

_PR_SET_DUMPABLE = 4


def serve() -> None:
    """The messages follow a line that only this process knows."""
    job: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "wb") as answer:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        if job["role"] == "calls":
            from rewards.services.sandbox.inside.solution import answer_calls

            answer.write(job["mark"].encode() + b"\n")
            answer.flush()
            answer_calls(job["job"], answer)
        else:
            answer.write(job["mark"].encode() + b"\n" + _run_tests(job["solution"], job["tests"]))
        answer.flush()
        os._exit(0)


def _run_tests(solution: dict[str, Any], tests: dict[str, Any]) -> bytes:
    """Not dumpable: processes of the same user, like the solution's, can neither trace this one nor read its memory
    and open files in /proc, unless the service gives its programs CAP_SYS_PTRACE."""
    from rewards.services.sandbox.inside.tester import run_tests

    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError("this process cannot be closed to the solution's")
    requests_out, requests_in = os.pipe()
    replies_out, replies_in = os.pipe()
    numbers = (os.open(os.devnull, os.O_WRONLY), requests_out, replies_in)
    script = (
        f"import sys; sys.path.insert(0, {os.getcwd()!r}); "  # noqa: PTH109
        f"from rewards.services.sandbox.inside.start import start; start('solution', {', '.join(map(str, numbers))})"
    )
    with tempfile.TemporaryFile() as job:
        job.write(json.dumps(solution).encode())
        job.seek(0)
        child = subprocess.Popen([sys.executable, "-I", "-c", script], stdin=job, stdout=1, pass_fds=numbers)
    for number in numbers:
        os.close(number)
    messages = io.BytesIO()
    requests: BinaryIO = os.fdopen(requests_in, "wb")
    run_tests(tests, requests, os.fdopen(replies_out, "rb"), messages)
    child.kill()
    child.wait()
    return messages.getvalue()
