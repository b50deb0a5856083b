"""The contract of a built-in tool: its options, what a process prepares for it, and what an episode does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from rlkit.environments.base import Task
from rlkit.environments.tool import Tool, tools_of
from rlkit.experience.section import Section

STEP_SHARE = 0.9
"""Share of a step's time limit after which a tool gives up, before its process is killed."""
LocalPath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""Relative to where the command was run: the processes of an environment may have another working folder."""


class Session:
    """A tool during one episode: its `@tool` method has the name of the tool's kind."""

    def __init__(self, options: Any, shared: Any, task: Task, seconds: float) -> None:
        """`shared`: what `prepare` returned. `seconds`: time limit of a call, after which the environment is taken to
        hang.

        Raises EnvironmentFailure.
        """
        self.options, self.shared, self.seconds = options, shared, seconds

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return what the policy reads, or an awaitable of it. Raises EnvironmentFailure; any other exception is shown
        to the policy."""
        return getattr(self, self.options.kind)(**arguments)

    def close(self) -> Any:
        """Release resources; may be a coroutine."""
        return None


class ToolOptions(Section):
    """Options of a tool; `kind` says which."""

    kind: str
    name: str = Field(default="", pattern=r"^[A-Za-z_]?[A-Za-z0-9_]*$")
    """Name that the policy calls; empty: its kind."""
    description: str = ""
    """Description that the policy reads; empty: the tool's own."""
    session: ClassVar[type[Session]]
    pays: ClassVar[bool] = False
    """Whether its answers have rewards."""

    def needs(self) -> tuple[str, ...]:
        """Columns that every problem must have."""
        return ()

    def repeats(self) -> bool:
        """Whether equal calls after equal calls get equal answers."""
        return True

    def check(self, seconds: float) -> list[str]:
        """Return messages for the user from cheap checks before a run. `seconds`: environment.step_timeout_seconds."""
        return []

    def prepare(self) -> Any:
        """Prepare what sessions share; called once per process, may be a coroutine. Raises UserError."""
        return None

    def names(self) -> tuple[str, ...]:
        """Names of its tools, as far as they are known before the run starts."""
        return (self.name or self.kind,)

    def words(self) -> str:
        """A description that replaces the docstring of the tool's method; empty: the docstring."""
        return ""

    def offers(self, shared: Any) -> tuple[Tool, ...]:
        (own,) = tools_of(self.session)
        described = self.description or self.words() or own.description
        return (replace(own, name=self.name or own.name, description=described),)
