"""The tool `python`: code cells in the sandboxes of `reward=code`."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from rewards.services.sandbox import Isolation, Run, SandboxOptions, Unavailable
from rlkit.environments.base import EnvironmentFailure, Task
from rlkit.environments.tool import tool
from rlkit.environments.tools.base import STEP_SHARE, Session, ToolOptions

_FENCE = re.compile(r"\s*```\w*\n(.*?)(?:```\s*)?", re.DOTALL)


@dataclass(frozen=True)
class _Sandboxes:
    isolation: Isolation
    threads: ThreadPoolExecutor


class PythonSession(Session):
    shared: _Sandboxes

    def __init__(self, options: Python, shared: _Sandboxes, task: Task, seconds: float) -> None:
        super().__init__(options, shared, task, seconds)
        self._cells: list[str] = []
        """Cells that ran to their end."""

    @tool
    async def python(self, code: str) -> str:
        """Run Python and read what it prints, and the value of its last line. Each call begins anew.

        code: Python source
        """
        fenced = _FENCE.fullmatch(code)
        cells = [*self._cells, fenced[1] if fenced else code]
        ended = secrets.token_hex(16)
        program = f"{_source()}\nrun({cells!r}, {ended!r})\n"
        deadline = time.monotonic() + STEP_SHARE * self.seconds
        loop = asyncio.get_running_loop()
        try:
            run = await loop.run_in_executor(
                self.shared.threads, self.shared.isolation.run_program, program, "", deadline
            )
        except Unavailable as error:
            raise EnvironmentFailure(f"python: {error}") from error
        except TimeoutError as error:
            details = "raise its processes, or environment.step_timeout_seconds"
            raise EnvironmentFailure(f"python: no sandbox was free in time; {details}") from error
        printed, mark, _ = run.stdout.decode(errors="replace").partition(ended)
        if mark and self.options.replay:
            self._cells = cells
        return _answer(run, printed, bool(mark), self.options)


class Python(ToolOptions, SandboxOptions):
    kind: Literal["python"] = "python"
    session: ClassVar[type[Session]] = PythonSession
    isolation: Literal["bubblewrap", "http"] = "bubblewrap"
    """Where the policy's code runs. bubblewrap: sandboxes on this machine; http: a SandboxFusion service. There is no
    unisolated mode."""
    replay: bool = False
    """Keep names from call to call: the episode's earlier cells, except those that were cut off, run again silently
    before each new one, within the same limits."""

    def repeats(self) -> bool:
        """Return False: programs read the clock, draw random numbers, and are cut off by time."""
        return False

    def check(self, seconds: float) -> list[str]:
        if self.wall_seconds >= STEP_SHARE * seconds:
            need = self.wall_seconds / STEP_SHARE
            return [f"python: wall_seconds={self.wall_seconds:g} needs environment.step_timeout_seconds above {need:g}"]
        sandbox = self.sandbox()
        try:
            sandbox.check()
        except Unavailable as error:
            return [f"python: {error}"]
        finally:
            sandbox.close()
        return []

    def prepare(self) -> _Sandboxes:
        """Start the sandboxes. Raises Unavailable."""
        isolation = self.sandbox()
        isolation.start()
        return _Sandboxes(isolation, ThreadPoolExecutor(self.processes, thread_name_prefix="python"))

    def words(self) -> str:
        kept = "Run Python and read what it prints, and the value of its last line. Names live on from call to call."
        return kept if self.replay else ""


@cache
def _source() -> str:
    return Path(__file__).with_name("cells.py").read_text()


def _answer(run: Run, printed: str, came_to_its_end: bool, options: Any) -> str:
    parts = [printed.rstrip(), run.stderr.rstrip()]
    if run.ended == "timeout":
        parts.append(f"error: stopped after {options.wall_seconds:g} s")
    elif run.ended == "output":
        parts.append(f"error: stopped, for it printed more than {options.output_kib} KiB")
    elif not came_to_its_end:
        how = "was killed" if run.exit_code is None else f"ended with exit code {run.exit_code}"
        parts.append(f"error: the interpreter {how}")
    return "\n".join(part for part in parts if part) or "(nothing was printed)"
