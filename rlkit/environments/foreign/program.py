"""`environment=program`: any command as the agent, started afresh for every episode."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator

from rewards.services.scratch import ScratchFolder
from rlkit.environments.agent import Agent, Endpoint
from rlkit.environments.base import Step, Task
from rlkit.environments.foreign.process import LEFT_SECONDS, Child, ProgramConfig, ProgramError, Tail, absolute
from rlkit.experience.section import Section

log = logging.getLogger(__name__)


class CommandConfig(ProgramConfig):
    command: tuple[str, ...] = Field(min_length=1)
    """The program and its arguments, which no shell interprets. Arguments that name files are passed as absolute
    paths."""
    prints_reward: bool = True
    """Its last line of output is {"reward": 1.0, "success": true, "metrics": {"name": 2.0}}, where only the reward is
    required. false: its output is free, and the run's reward judges the last answer."""

    @field_validator("command")
    @classmethod
    def _files_are_found_from_any_folder(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        program, *arguments = command
        begins = absolute(program) if "/" in program else program
        files = [os.path.isfile(word) for word in arguments]  # noqa: PTH113 - words that are too long for a path
        return (begins, *(absolute(word) if file else word for word, file in zip(arguments, files, strict=True)))


@functools.cache
def _folders() -> ScratchFolder:
    """Return the folder in which the programs of this process work."""
    return ScratchFolder("rlkit-agents-")


class Printed(Section):
    reward: float
    success: bool | None = None
    metrics: Mapping[str, float] = Field(default_factory=dict)


class Program(Agent):
    """The program works in an empty folder that is removed afterwards, finds the policy at OPENAI_BASE_URL
    (OPENAI_API_KEY, OPENAI_MODEL), and reads the task from its standard input, as one line of JSON."""

    Config = CommandConfig
    config: CommandConfig

    @classmethod
    def deterministic(cls, config: CommandConfig) -> bool:
        return False  # its behaviour is unknown

    @classmethod
    def gives_rewards(cls, config: CommandConfig) -> bool:
        return config.prints_reward

    @classmethod
    def check(cls, config: CommandConfig) -> list[str]:
        messages = config.missing()
        if shutil.which(config.command[0]) is None:
            messages.append(
                f"environment.command: {config.command[0]} is not a program here: not an executable file, or "
                "not in PATH"
            )
        return messages

    async def run(self, task: Task, model: Endpoint) -> Step:
        variables = {
            **self.config.passed_on(),
            "OPENAI_BASE_URL": model.base_url,
            "OPENAI_API_KEY": model.api_key,
            "OPENAI_MODEL": model.model,
        }
        folder = tempfile.mkdtemp(dir=_folders().path)
        try:
            child = await Child.start(self.config.command, variables, folder)
            try:
                printed = await _output(child, self._described(task))
            except asyncio.CancelledError:
                await child.end()
                log.warning("%s was killed at its deadline: %s", self.config.command[0], child.ending())
                raise
            finally:
                await child.end()
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)  # before returning, because the host may end then
        if child.process.returncode != 0:
            raise ProgramError(child.ending())
        return _step(printed) if self.config.prints_reward else Step()

    def _described(self, task: Task) -> str:
        fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
        messages = [{"role": message.role, "content": message.content} for message in task.messages]
        return json.dumps({**fields, "messages": messages, "seed": self.seed}) + "\n"


async def _output(child: Child, said: str) -> str:
    """Return the end of the program's output."""
    tail = Tail()
    reading = asyncio.create_task(tail.follow(child.stdout))
    child.stdin.write(said.encode())
    with contextlib.suppress(ConnectionError):  # it may not read its task
        await child.stdin.drain()
    child.stdin.close()
    await child.ended()
    child.kill()  # kills what it left behind, which holds its output
    await asyncio.wait({reading}, timeout=LEFT_SECONDS)
    reading.cancel()
    return tail.text()


def _step(printed: str) -> Step:
    """Parse the printed reward. Raises ProgramError."""
    line = printed.rpartition("\n")[2]
    try:
        values: dict[str, Any] = Printed.model_validate_json(line, strict=True).model_dump()
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise ProgramError(
            f'its last line should be {{"reward": NUMBER}} (environment.prints_reward=false if it prints none), but '
            f"is {line!r:.200}: {place} {wrong['msg']}"
        ) from error
    return Step(**values)
