"""Environments in processes next to the rollout worker: one that hangs or dies is killed and replaced, and its episodes
fail with the cause."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlkit.cluster.processes import die_with_parent, end, start
from rlkit.environments.agent import Endpoint
from rlkit.environments.base import Action, Environment, EnvironmentConfig, Step, Task
from rlkit.environments.tool import Tool, ToolsChangedError, changes
from rlkit.experience import Message, UserError
from rlkit.experience.names import find_class
from rlkit.rollout.hosts import EpisodeFailedError, InlineHost

GRACE_SECONDS = 1.0
"""Added to `step_timeout_seconds`, so that what can be cancelled can itself report that it took too long."""
_HEAD = struct.Struct("!Q")


@dataclass
class _Call:
    key: str
    answer: asyncio.Future[Any]
    asked: float = field(default_factory=time.monotonic)
    began: float | None = None
    """When the process began it; None: it waits behind another call."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    writer: asyncio.StreamWriter
    calls: dict[int, _Call] = field(default_factory=dict)
    episodes: set[str] = field(default_factory=set)
    reading: asyncio.Task[None] | None = None
    heard: float = 0.0
    """When it last sent something."""

    def late(self, seconds: float) -> set[int]:
        """Return the calls begun longer than `seconds` ago. If none has begun, return those waiting while the process
        has been silent for twice as long: then it hangs between two calls."""
        now = time.monotonic()
        began = {number: call.began for number, call in self.calls.items() if call.began is not None}
        if began:
            return {number for number, when in began.items() if now - when > seconds}
        return {n for n, call in self.calls.items() if now - max(call.asked, self.heard) > 2 * seconds}


class ProcessHost:
    """`environment.workers` processes with at most `environment.concurrency` episodes each.

    If a process must be killed, or dies, the calls that it was busy with count as the cause; its other episodes begin
    again at no cost (`EpisodeFailedError.innocent`).
    """

    def __init__(
        self, target: str, cls: type[Environment], config: EnvironmentConfig, log: Path, startup: float
    ) -> None:
        """`target`: the dotted path of `cls`. `log`: file for the processes' output. `startup`: seconds to prepare."""
        self.target, self.cls, self.config, self.log, self.startup = target, cls, config, log, startup
        self.tools: tuple[Tool, ...] = ()
        self._workers: list[_Worker | None] = [None] * config.workers
        self._starting = [asyncio.Lock() for _ in range(config.workers)]
        self._place: dict[str, int] = {}
        """Open episode -> index of its process."""
        self._suspects = set[str]()
        """Episodes whose process ended while it was busy with none of them: any of them may be the cause."""
        self._left = asyncio.Condition()
        """Notified when an episode leaves."""
        self._numbers = itertools.count()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the processes. Raises UserError if an environment cannot be prepared."""
        self._watch = asyncio.create_task(self._enforce_deadlines())
        await asyncio.gather(*(self._worker(index) for index in range(len(self._workers))))

    async def open(self, key: str, task: Task, seed: int) -> tuple[Message, ...]:
        async with self._left:
            await self._left.wait_for(lambda: self._load(self._least()) < self.config.concurrency)
            self._place[key] = self._least()
        messages: tuple[Message, ...] = await self._ask(key, "open", task, seed)
        return messages

    async def step(self, key: str, action: Action | Endpoint) -> Step:
        step: Step = await self._ask(key, "step", action)
        return step

    async def close(self, key: str) -> None:
        worker = self._workers[self._place[key]] if key in self._place else None
        with contextlib.suppress(EpisodeFailedError):
            if worker is not None and key in worker.episodes:
                await self._ask(key, "close")
        async with self._left:
            self._place.pop(key, None)
            self._suspects.discard(key)
            if worker is not None:
                worker.episodes.discard(key)
            self._left.notify_all()

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        workers = [worker for worker in self._workers if worker is not None]
        for worker in workers:
            if worker.reading is not None:
                worker.reading.cancel()
            worker.writer.close()
        await asyncio.to_thread(end, [worker.process for worker in workers])

    def _load(self, index: int) -> int:
        return list(self._place.values()).count(index)

    def _least(self) -> int:
        return min(range(len(self._workers)), key=self._load)

    async def _ask(self, key: str, method: str, *arguments: Any) -> Any:
        """Call a method of an episode in its process. Raises EpisodeFailedError or ToolsChangedError."""
        index = self._place[key]
        if method == "open":
            try:
                worker = await self._worker(index)
            except ToolsChangedError:
                raise
            except UserError as error:
                raise EpisodeFailedError("failure", str(error)) from error
            worker.episodes.add(key)
        else:
            alive = self._workers[index]
            if alive is None or key not in alive.episodes:
                details = "the environment's process ended between two turns"
                raise EpisodeFailedError("died", details, innocent=key not in self._suspects)
            worker = alive
        number = next(self._numbers)
        call = worker.calls[number] = _Call(key, asyncio.get_running_loop().create_future())
        try:
            _write(worker.writer, (number, method, key, *arguments))
            return await call.answer
        finally:
            worker.calls.pop(number, None)

    async def _worker(self, index: int) -> _Worker:
        """Return the process with this index, started if there is none. Raises UserError."""
        async with self._starting[index]:
            worker = self._workers[index]
            if worker is None:
                worker = self._workers[index] = await self._start_process(index)
            return worker

    async def _start_process(self, index: int) -> _Worker:
        ours, theirs = socket.socketpair()
        name = f"{self.cls.__name__}, process {index}"
        command = [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()})"]
        # An agent's calls to the policy must not go through a proxy.
        direct = ",".join(filter(None, [os.environ.get("no_proxy", os.environ.get("NO_PROXY")), "127.0.0.1"]))
        paths = os.pathsep.join(path or "." for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": paths, "NO_PROXY": direct, "no_proxy": direct}
        log = self.log.with_name(f"{self.log.stem}.{index}.{next(self._numbers)}.log")
        with theirs:
            process = start(command, log, environment, files=(theirs.fileno(),))
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = _Worker(process, writer)
        try:
            async with asyncio.timeout(self.startup):
                _write(writer, (self.target, self.config.model_dump(mode="json")))
                tools = await _read(reader)
        except (TimeoutError, EOFError, OSError) as error:
            await asyncio.to_thread(end, [process])
            why = (
                f"was not ready after {self.startup:g} s" if isinstance(error, TimeoutError) else "ended while starting"
            )
            raise UserError(f"environment: {name} {why}; its output is in {log}") from error
        if isinstance(tools, str):
            await asyncio.to_thread(end, [process])
            raise UserError(f"environment: {name} cannot be prepared: {tools}; its output is in {log}")
        if self.tools and (different := changes(self.tools, tools)):
            await asyncio.to_thread(end, [process])
            raise ToolsChangedError(
                f"environment: {name} has different tools from the first one, which the prompts describe: {different}"
            )
        self.tools = self.tools or tools
        worker.reading = asyncio.create_task(self._receive(index, worker, reader))
        return worker

    async def _receive(self, index: int, worker: _Worker, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, kind, value = await _read(reader)
                worker.heard = time.monotonic()
                call = worker.calls.get(number)
                if call is None or call.answer.done():
                    continue
                if kind == "began":
                    call.began = time.monotonic()
                elif kind == "failed":
                    call.answer.set_exception(EpisodeFailedError(*value))
                elif kind == "changed":
                    call.answer.set_exception(ToolsChangedError(value))
                else:
                    call.answer.set_result(value)
        except (EOFError, OSError):
            await self._lose(index, worker, "died", f"the environment's process {worker.process.pid} ended")

    async def _enforce_deadlines(self) -> None:
        limit = self.config.step_timeout_seconds
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            for index, worker in enumerate(self._workers):
                if worker is None:
                    continue
                if late := worker.late(limit + GRACE_SECONDS):
                    details = f"no answer within environment.step_timeout_seconds={limit:g}; its process was killed"
                    await self._lose(index, worker, "timeout", details, late)

    async def _lose(self, index: int, worker: _Worker, kind: str, details: str, causes: set[int] | None = None) -> None:
        """End a process and fail its calls. `causes`: the calls at fault; None: those that it was busy with."""
        if self._workers[index] is not worker:
            return
        self._workers[index] = None
        busy = {number for number, call in worker.calls.items() if call.began is not None}
        if not busy:
            self._suspects |= worker.episodes
        worker.episodes.clear()
        worker.writer.close()
        if worker.reading is not None and worker.reading is not asyncio.current_task():
            worker.reading.cancel()
        for number, call in list(worker.calls.items()):
            if not call.answer.done():
                innocent = number not in (busy if causes is None else causes)
                call.answer.set_exception(EpisodeFailedError(kind, details, innocent=innocent))
        await asyncio.to_thread(end, [worker.process])


# -- in the process ----------------------------------------------------------------------------------------------------


def main(file: int) -> None:
    die_with_parent()
    # A process that an environment forks must not hold the connection, or it would take calls from this one.
    os.register_at_fork(after_in_child=lambda: os.dup2(os.open(os.devnull, os.O_RDWR), file))
    asyncio.run(_serve(socket.socket(fileno=file)))


async def _serve(connection: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    writer.transport.set_write_buffer_limits(0)  # after drain() nothing is left in this process
    target, options = await _read(reader)
    try:
        host = await _prepared(target, options)
    except Exception as error:
        _write(writer, f"{type(error).__name__}: {error}")
        await writer.drain()
        raise
    # A tool's check of arguments is a function and stays in this process.
    _write(writer, tuple(replace(tool, check=None) for tool in host.tools))
    running: set[asyncio.Task[None]] = set()
    me, taking_up = os.getpid(), asyncio.Lock()
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, method, *arguments = await _read(reader)
            task = asyncio.create_task(_answer(host, writer, taking_up, number, method, arguments))
            running.add(task)
            task.add_done_callback(running.discard)
    if os.getpid() != me:
        os._exit(0)  # an orderly exit would shut down what a forked process shares with this one


async def _prepared(target: str, options: Mapping[str, Any]) -> InlineHost:
    cls: type[Environment] = find_class("environment", target, Environment)
    host = InlineHost(cls, cls.Config(**options))
    await host.start()
    return host


async def _answer(
    host: InlineHost, writer: asyncio.StreamWriter, taking_up: asyncio.Lock, number: int, method: str, arguments: Any
) -> None:
    async with taking_up:  # one by one, or calls behind a hanging one would seem to have begun
        _write(writer, (number, "began", None))
        await writer.drain()  # if this call ends the process, its beginning and earlier answers are known
    try:
        value = await getattr(host, method)(*arguments)
        _write(writer, (number, "answer", value))
    except EpisodeFailedError as error:
        _write(writer, (number, "failed", (error.kind, error.details, error.again)))
    except ToolsChangedError as error:
        _write(writer, (number, "changed", str(error)))
    except Exception as error:  # an answer that cannot be sent
        _write(writer, (number, "failed", ("exception", f"{type(error).__name__}: {error}", False)))


# -- both --------------------------------------------------------------------------------------------------------------


def _write(writer: asyncio.StreamWriter, message: Any) -> None:
    """Send a message, pickled: both processes run the same program, and no other has the socket."""
    content = pickle.dumps(message)
    writer.write(_HEAD.pack(len(content)) + content)


async def _read(reader: asyncio.StreamReader) -> Any:
    """Receive a message. Raises EOFError at the end."""
    (length,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    return pickle.loads(await reader.readexactly(length))
