"""Child processes that end with their parent, or at a deadline. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

KILL_SECONDS = 10.0
Process = BaseProcess | subprocess.Popen[bytes]


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def spawn(function: Callable[..., Any], *arguments: Any, name: str | None = None) -> BaseProcess:
    """Start `function(*arguments)` (pickled by name) in a fresh Python process that dies with this one. Raises
    OSError.

    It leads its own session, so Ctrl-C reaches only the parent.
    """
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(function, arguments), name=name)
    process.start()
    return process


def _call(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setsid()
    die_with_parent()
    function(*arguments)


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], files: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a command in its own session, with its output in `log`; it may call `die_with_parent`.

    `files`: file descriptors that it inherits.
    """
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
            pass_fds=files,
        )


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if neither can run Python any more.

    PR_SET_PDEATHSIG would watch the thread that started this process, or the fork server. Instead the parent's end
    of a pipe (the sentinel, or standard input) closes with the parent, and O_ASYNC turns that into a signal.
    """
    parent = multiprocessing.parent_process()
    pipe = sys.stdin.fileno() if parent is None else parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # the parent had already ended
        os._exit(1)


def wait(process: Process, seconds: float) -> bool:
    if isinstance(process, BaseProcess):
        process.join(max(0.0, seconds))
        return process.exitcode is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, seconds))
    return process.poll() is not None


def end(processes: Iterable[Process], seconds: float = 0.0) -> None:
    """Send SIGTERM to processes of `spawn` and `start`, and after `seconds` SIGKILL to their process groups."""
    processes = list(processes)
    if seconds:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + seconds
        for process in processes:
            wait(process, deadline - time.monotonic())
    for process in processes:
        ended = wait(process, 0.0)
        if not (ended and Path(f"/proc/{_pid(process)}").exists()):  # otherwise another process has its number by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(_pid(process), signal.SIGKILL)
        process.kill()
    for process in processes:
        wait(process, KILL_SECONDS)
        if isinstance(process, subprocess.Popen) and process.stdin is not None:
            process.stdin.close()


def _pid(process: Process) -> int:
    assert process.pid is not None  # it was started
    return process.pid


def kill_with_children(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Kill a process and its children, even those that left its group. `seconds`: limit on stopping it first."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGSTOP)  # so that it starts no further children
    deadline = time.monotonic() + seconds
    while not _is_stopped(process.pid) and time.monotonic() < deadline:
        time.sleep(0.0005)
    for child in _children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.kill()


def _is_stopped(pid: int) -> bool:
    """Return whether a child is stopped or has ended, without reaping it."""
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # another thread has waited for it
        return True


def _children(pid: int) -> list[int]:
    try:
        return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []  # it has ended
