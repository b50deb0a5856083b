"""Entry point inside a service that runs one program and returns its standard output."""

from __future__ import annotations

import ctypes
import hmac
import json
import os
import subprocess
import sys
import tempfile
from typing import Any, BinaryIO, cast

from rewards.services.sandbox.inside.wire import send

_PR_SET_DUMPABLE = 4


class Sealed:
    """A stream of lines, each sealed with its position and content: code that reaches the service's pipe but does not
    have the key cannot add, change or repeat a line."""

    def __init__(self, stream: BinaryIO, key: str) -> None:
        self._stream, self._key, self._count = stream, key, 0

    def write(self, line: bytes) -> None:
        self._stream.write(b"\n" + _seal(self._key, self._count, line) + b" " + line)
        self._count += 1

    def flush(self) -> None:
        self._stream.flush()


def unsealed(printed: bytes, key: str) -> bytes:
    """Return the lines that a `Sealed` wrote, out of everything printed."""
    lines: list[bytes] = []
    for line in printed.splitlines(keepends=True):
        seal, _, content = line.partition(b" ")
        if hmac.compare_digest(seal, _seal(key, len(lines), content)):
            lines.append(content)
    return b"".join(lines)


def _seal(key: str, place: int, line: bytes) -> bytes:
    return hmac.digest(key.encode(), b"%d " % place + line, "sha256").hex().encode()


def serve() -> None:
    """Serve; the first message is `ready`. Messages are written at once: the service may end this process any time."""
    job: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "wb") as answer:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        results = cast("BinaryIO", Sealed(answer, job["key"]))
        if job["role"] == "calls":
            from rewards.services.sandbox.inside.solution import answer_calls

            send(results, "ready")
            answer_calls(job["job"], results)
        else:
            _close_to_others()
            send(results, "ready")
            _run_tests(job["solution"], job["tests"], results)
        os._exit(0)


def _close_to_others() -> None:
    """Make this process not dumpable: processes of the same user, such as the solution, can neither trace it nor read
    its memory and open files in /proc, unless the service gives its programs CAP_SYS_PTRACE."""
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError("this process cannot be closed to the solution's")


def _run_tests(solution: dict[str, Any], tests: dict[str, Any], results: BinaryIO) -> None:
    from rewards.services.sandbox.inside.tester import run_tests

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
    run_tests(tests, os.fdopen(requests_in, "wb"), os.fdopen(replies_out, "rb"), results)
    child.kill()
    child.wait()
