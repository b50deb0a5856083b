"""`environment=verifiers`: environments of Prime Intellect's package, in an interpreter that has it installed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from rlkit.environments.agent import Agent, Endpoint
from rlkit.environments.base import EnvironmentNeeds, Step, Task
from rlkit.environments.foreign.bridge import Bridge
from rlkit.environments.foreign.process import SHOWN, ProgramConfig, absolute
from rlkit.environments.games.drawing import of_split
from rlkit.experience import Message, UserError

SCRIPT = str(Path(__file__).parent / "inside" / "verifiers_bridge.py")
ROW = "verifiers"
"""Column with the task in the package's form."""
LOADING_SECONDS = 1800.0
"""Time for an environment to list its tasks; the first time it may have to load data."""


class VerifiersConfig(ProgramConfig):
    python: str
    """Interpreter of a Python environment with `verifiers` and the package of `id`, e.g. path/to/venv/bin/python."""
    id: str
    """Id for `verifiers.load_environment`, or of a taskset of verifiers.v1; also a module in the folder where the run
    starts."""
    arguments: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of `load_environment`; for verifiers.v1, fields of its `[env]` block, e.g.
    {agent:{runtime:{type:subprocess}}}."""
    success_at: float = 0.5
    """Reward from which an episode counts as a success."""
    max_tasks: int | None = Field(default=None, ge=1)
    """Number of tasks to use, the first ones; null: all."""

    @field_validator("python")
    @classmethod
    def _found_from_any_folder(cls, python: str) -> str:
        return absolute(python)


class Verifiers(Agent):
    """Tasks, rewards and metrics are those of the verifiers environment. If it has no evaluation data, a hash of a
    task's content decides whether the task is held out."""

    Config = VerifiersConfig
    config: VerifiersConfig

    @classmethod
    def needs(cls, config: VerifiersConfig) -> EnvironmentNeeds:
        return EnvironmentNeeds(columns=(ROW,))

    @classmethod
    def deterministic(cls, config: VerifiersConfig) -> bool:
        return False  # its behaviour is unknown

    @classmethod
    def check(cls, config: VerifiersConfig) -> list[str]:
        messages = config.missing()
        try:
            _listed(config)
        except UserError as error:
            messages.append(str(error))
        return messages

    @classmethod
    def tasks(cls, config: VerifiersConfig, split: Literal["train", "heldout"], seed: int) -> Sequence[Task]:
        listed = _listed(config)
        own = listed[split] if "heldout" in listed else of_split(listed["train"], lambda task: task["key"], split)
        return [_task(f"{config.id}/{split}/{number}", task) for number, task in enumerate(own)]

    @classmethod
    async def prepare(cls, config: VerifiersConfig) -> Bridge:
        bridge = Bridge(f"environment.id={config.id}", _command(config), config.passed_on(), _purpose(config))
        await bridge.start()
        return bridge

    async def run(self, task: Task, model: Endpoint) -> Step:
        request = {"row": task.columns[ROW], "base_url": model.base_url, "model": model.model}
        played = await self.context.shared.ask(request)
        reward = float(played["reward"])
        return Step(reward=reward, success=reward >= self.config.success_at, metrics=played["metrics"])


def _command(config: VerifiersConfig) -> list[str]:
    return [config.python, SCRIPT]


def _purpose(config: VerifiersConfig, **more: Any) -> dict[str, Any]:
    return {"id": config.id, "arguments": config.arguments, "folder": str(Path.cwd()), "list": False, **more}


def _listed(config: VerifiersConfig) -> Mapping[str, list[Any]]:
    """Return split -> tasks. Raises UserError."""
    return _asked(config.model_dump_json())


@functools.cache
def _asked(options: str) -> Mapping[str, list[Any]]:
    config = VerifiersConfig.model_validate_json(options)
    if not os.access(config.python, os.X_OK):
        remedy = f"run python -m venv {Path(config.python).parent.parent}, and install verifiers into it"
        raise UserError(f"environment.python: {config.python} is not a program; {remedy}")
    purpose = json.dumps(_purpose(config, list=True, most=config.max_tasks)) + "\n"
    where = f"environment.id={config.id}"
    try:
        done = subprocess.run(
            _command(config),
            input=purpose,
            env=config.passed_on(),
            capture_output=True,
            text=True,
            timeout=LOADING_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{where} was not loaded within {LOADING_SECONDS:g} s") from error
    if not done.stdout:
        raise UserError(f"{where} ended while loading, exit code {done.returncode}: {done.stderr[-SHOWN:]}")
    listed: dict[str, Any] = json.loads(done.stdout)
    if "error" in listed:
        raise UserError(f"{where}: {listed['error']}")
    return listed


def _task(name: str, task: Mapping[str, Any]) -> Task:
    messages = tuple(Message(message["role"], message["content"]) for message in task["messages"])
    return Task(name, messages, task["answer"], columns={ROW: task["row"]})
