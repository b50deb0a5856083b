"""Runs child processes with a deadline and limited output, so that nothing is left behind."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlkit.cluster.janitor import TOKEN
from rlkit.cluster.processes import kill_with_children

KILL_SECONDS = 5.0
"""How long the kernel may take to end a killed process and its namespace, in seconds."""
_CHUNK = 65536


@dataclass(frozen=True)
class Command:
    arguments: Callable[[int], list[str]]
    """Command line, as a function of the file descriptor that results are written to."""
    stdin: int
    descriptors: tuple[int, ...] = ()


@dataclass
class Child:
    process: subprocess.Popen[bytes]
    pidfd: int
    streams: dict[str, int]
    limits: dict[str, int]
    written: dict[str, bytearray] = field(default_factory=dict)
    overflow: str = ""

    @property
    def exit_code(self) -> int | None:
        return self.process.returncode

    def kill(self) -> None:
        # If only bubblewrap's outer process were killed, before the inner one has asked to die with it, the sandbox
        # would stay for ever. The inner one is the first of its namespace: all others end with it.
        kill_with_children(self.process, KILL_SECONDS)


@dataclass(frozen=True)
class Supervised:
    children: tuple[Child, ...]
    ended: Literal["exit", "timeout", "startup", "output", "deadline"]


def supervise(
    commands: Sequence[Command],
    ready: bytes,
    wall_seconds: float,
    startup_seconds: float,
    deadline: float,
    max_output: int,
    max_results: int,
    handed_over: Sequence[int] = (),
) -> Supervised:
    """Run processes concurrently until the first command's process ends, then kill the others.

    The wall time starts when all have written `ready` to their results, within `startup_seconds`; `deadline`
    (`time.monotonic()`) overrides both. A process that exceeds a stream's limit (bytes) is killed. The descriptors in
    `handed_over` are closed once inherited. Raise OSError if a process cannot be started.
    """
    children: list[Child] = []
    try:
        try:
            for command in commands:
                children.append(_start(command, max_output, max_results))
        finally:
            for descriptor in handed_over:
                os.close(descriptor)
        ended = _watch(children, ready, wall_seconds, startup_seconds, deadline)
    finally:
        for child in children:
            child.kill()
        for child in children:
            _drain(child)
        _reap(children)
    return Supervised(tuple(children), "output" if ended == "exit" and children[0].overflow else ended)


def _start(command: Command, max_output: int, max_results: int) -> Child:
    results, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            command.arguments(write_end),
            stdin=command.stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write_end, *command.descriptors),
            # bubblewrap's outer process asks to die with its parent and then lets the inner one continue. If it is
            # killed in between, the inner one waits for ever; the run's janitor ends processes with its token.
            env={name: value for name, value in os.environ.items() if name == TOKEN},
        )
    except BaseException:
        os.close(results)
        raise
    finally:
        os.close(write_end)
    assert process.stdout is not None and process.stderr is not None
    streams = {"stdout": process.stdout.fileno(), "stderr": process.stderr.fileno(), "results": results}
    limits = {"stdout": max_output, "stderr": max_output, "results": max_results}
    return Child(process, os.pidfd_open(process.pid), streams, limits, {name: bytearray() for name in streams})


def _watch(
    children: Sequence[Child], ready: bytes, wall_seconds: float, startup_seconds: float, deadline: float
) -> Literal["exit", "timeout", "startup", "output", "deadline"]:
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pidfd, selectors.EVENT_READ, (child, ""))
            for name, descriptor in child.streams.items():
                selector.register(descriptor, selectors.EVENT_READ, (child, name))
        own_deadline = time.monotonic() + startup_seconds
        waiting_for = list(children)
        while True:
            remaining = min(own_deadline, deadline) - time.monotonic()
            if remaining <= 0:
                if deadline < own_deadline:
                    return "deadline"
                return "startup" if waiting_for else "timeout"
            for key, _ in selector.select(remaining):
                child, name = key.data
                if not name:
                    child.process.wait()
                    selector.unregister(child.pidfd)
                elif not _read(child, name):
                    selector.unregister(child.streams[name])
                if child.overflow:
                    child.kill()
                    if child is children[0]:
                        return "output"
            if waiting_for:
                waiting_for = [child for child in waiting_for if not child.written["results"].startswith(ready)]
                if not waiting_for:
                    own_deadline = time.monotonic() + wall_seconds
            if children[0].exit_code is not None:
                return "exit"


def _read(child: Child, name: str) -> bool:
    data = os.read(child.streams[name], _CHUNK)
    kept = child.written[name]
    kept += data[: max(0, child.limits[name] - len(kept))]
    if len(kept) == child.limits[name] and data:
        child.overflow = child.overflow or name
    return bool(data)


def _drain(child: Child) -> None:
    """Read what an ended process left in its pipes, which its namespace may still be closing."""
    end = time.monotonic() + KILL_SECONDS
    with selectors.DefaultSelector() as selector:
        for name, descriptor in child.streams.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        while selector.get_map() and not child.overflow and time.monotonic() < end:
            for key, _ in selector.select(end - time.monotonic()):
                if not _read(child, key.data):
                    selector.unregister(key.fd)


def _reap(children: Sequence[Child]) -> None:
    for child in children:
        try:
            child.process.wait(KILL_SECONDS)
        finally:
            os.close(child.pidfd)
            os.close(child.streams["results"])
            for stream in (child.process.stdout, child.process.stderr):
                assert stream is not None
                stream.close()
