"""A program in a separate interpreter that plays many episodes in parallel and is addressed through its pipes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.environments.base import EnvironmentFailure
from rlkit.environments.foreign.process import Child, ProgramError
from rlkit.experience import UserError

UNWINDING_SECONDS = 10.0
"""Time for a program to confirm a cancellation; if it does not, it is taken to hang and is killed."""


class Bridge:
    """Messages are JSON objects, one per line. The first tells the program its purpose, and it answers {} or {"error":
    why}. After that, {"number": n, ...} is answered by {"number": n, ...}, in any order, and {"cancel": n} immediately
    by {"cancelled": n}.

    A program that has ended is restarted by the next request.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], purpose: Mapping[str, Any]
    ) -> None:
        self.name, self.command, self.environment, self.purpose = name, command, environment, purpose
        self._child: Child | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._cancelled: dict[int, asyncio.TimerHandle] = {}
        self._reading = set[asyncio.Task[None]]()

    async def start(self) -> None:
        """Start the program. Raises UserError."""
        child = await Child.start(self.command, self.environment, echo=True)
        try:
            _write(child, self.purpose)
            line = await child.stdout.readline()
            error = json.loads(line).get("error") if line else ""
        except BaseException:
            await child.end()
            raise
        if error is not None:
            await child.end()
            raise UserError(f"{self.name}: {error}" if error else f"{self.name} ended during startup, {child.ending()}")
        self._child, reading = child, asyncio.create_task(self._read(child))
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)

    async def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send a request and return the answer. Raises ProgramError for an error that the program reports,
        EnvironmentFailure if the program ends meanwhile."""
        async with self._starting:
            if self._child is None:
                try:
                    await self.start()
                except UserError as error:
                    raise EnvironmentFailure(str(error)) from error
            child = self._child
        assert child is not None
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        _write(child, {"number": number, **request})
        try:
            fields: Mapping[str, Any] = await answer
        except asyncio.CancelledError:
            _write(child, {"cancel": number})
            self._cancelled[number] = asyncio.get_running_loop().call_later(UNWINDING_SECONDS, child.kill)
            raise
        finally:
            self._asked.pop(number, None)
        if "error" in fields:
            raise ProgramError(fields["error"])
        return fields

    async def _read(self, child: Child) -> None:
        try:
            while line := await child.stdout.readline():
                fields = json.loads(line)
                if "cancelled" in fields:
                    self._cancelled.pop(fields["cancelled"]).cancel()
                elif (answer := self._asked.get(fields["number"])) is not None and not answer.done():
                    answer.set_result(fields)
        finally:
            self._child = None  # later requests go to a new program
            lost, timers = list(self._asked.values()), list(self._cancelled.values())
            self._asked.clear()
            self._cancelled.clear()
            for timer in timers:
                timer.cancel()
            await child.end()
            for answer in lost:
                if not answer.done():
                    answer.set_exception(EnvironmentFailure(f"{self.name} ended, {child.ending()}"))


def _write(child: Child, fields: Mapping[str, Any]) -> None:
    if not child.stdin.is_closing():
        child.stdin.write(json.dumps(fields).encode() + b"\n")
