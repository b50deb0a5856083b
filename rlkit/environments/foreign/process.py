"""Foreign programs, next to this process: they end with it, get none of its secrets, and report how they failed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlkit.environments.agent import AgentConfig

KEPT = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "NO_PROXY", "no_proxy",
)  # fmt: skip
"""Environment variables that every program gets."""
TAIL_BYTES = 64 * 1024
"""Bytes kept from the end of an output."""
SHOWN = 2000
"""Characters of it that a message shows."""
LINE_BYTES = 1024 * 1024
LEFT_SECONDS = 0.5
"""Time for outputs to close after their program has ended."""

_BEGIN = """
import fcntl, os, select, signal, sys
pipe, command = int(sys.argv[1]), sys.argv[2:]
fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
if select.select([pipe], [], [], 0)[0]:
    sys.exit("its starter has ended")
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"{command[0]}: {error.strerror}")
"""
"""Turns into the command, after asking the kernel to kill its process group when the other end of the pipe closes. This
works for programs in any language, even if they hang."""


class ProgramError(Exception):
    """A foreign program failed. If the policy had spent a budget, the failure is attributed to the policy."""


class ProgramConfig(AgentConfig):
    variables: tuple[str, ...] = ()
    """Environment variables that the program may read, besides PATH, HOME, TMPDIR and the language settings."""

    def missing(self) -> list[str]:
        """Return messages for the user about variables that are not set."""
        names = [name for name in self.variables if name not in os.environ]
        return [f"environment.variables: {name} is not set here; set it, or leave it out" for name in names]

    def passed_on(self) -> dict[str, str]:
        return {name: os.environ[name] for name in (*KEPT, *self.variables) if name in os.environ}


def absolute(path: str) -> str:
    """Make a path valid in any working folder; links are not resolved, because venvs are found by theirs."""
    return str(Path(path).expanduser().absolute())


class Child:
    """A running program; `process` holds its standard input and output."""

    def __init__(self, process: asyncio.subprocess.Process, life: int, echo: bool) -> None:
        self.process, self._life, self._exit = process, life, -1
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            self._exit = os.pidfd_open(process.pid)
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self.stdin, self.stdout = process.stdin, process.stdout
        self._errors = Tail(echo)
        self._following = asyncio.create_task(self._errors.follow(process.stderr))

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], folder: str | None = None, echo: bool = False
    ) -> Child:
        """Start a program. `folder`: its working folder. `echo`: copy its standard error to ours."""
        pipe, life = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _BEGIN, str(pipe), *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                cwd=folder,
                start_new_session=True,
                pass_fds=(pipe,),
                limit=LINE_BYTES,
            )
        except BaseException:
            os.close(life)
            raise
        finally:
            os.close(pipe)
        return cls(process, life, echo)

    def kill(self) -> None:
        """Kill the program with its process group, including processes that it left behind."""
        if self._life >= 0:
            ended = self.process.returncode is not None
            if not (ended and Path(f"/proc/{self.process.pid}").exists()):  # else another has this id by now
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            os.close(self._life)
            self._life = -1

    async def ended(self) -> None:
        """Wait for its exit. asyncio's `wait` would also wait for its outputs, which processes it left behind may hold
        open."""
        if self._exit < 0:
            return
        exited, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(self._exit, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(self._exit)

    async def end(self) -> None:
        """Kill it and read the rest of its standard error."""
        self.kill()
        await self.ended()
        if self._exit >= 0:
            os.close(self._exit)
            self._exit = -1
        code = asyncio.create_task(self.process.wait())
        await asyncio.wait({code, self._following}, timeout=LEFT_SECONDS)
        code.cancel()

    def ending(self) -> str:
        """Describe how it ended, for a message."""
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        said = self._errors.text()
        return f"{how}: {said[-SHOWN:]}" if said else how


class Tail:
    """The last part of an output."""

    def __init__(self, echo: bool = False) -> None:
        self._kept, self._echo = b"", echo

    async def follow(self, stream: asyncio.StreamReader) -> None:
        while piece := await stream.read(TAIL_BYTES):
            self._kept = (self._kept + piece)[-TAIL_BYTES:]
            if self._echo:
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()

    def text(self) -> str:
        return self._kept.decode(errors="replace").strip()
