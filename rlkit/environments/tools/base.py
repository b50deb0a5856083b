"""What a tool of the package is: options, what a process prepares for it, and what an episode does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from rlkit.environments.base import Task
from rlkit.environments.tool import Tool, tools_of
from rlkit.experience.section import Section


class Session:
    """A tool during one episode: its `@tool` method has the name of the tool's kind."""

    def __init__(self, options: Any, shared: Any, task: Task, seconds: float) -> None:
        """`shared`: what `prepare` returned. `seconds` of a call, after which the environment is taken to hang.

        Raises EnvironmentFailure.
        """
        self.options, self.shared, self.seconds = options, shared, seconds

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return what the policy reads, or an awaitable of it. Raises EnvironmentFailure; any other exception is for
        the policy to read, too."""
        return getattr(self, self.options.kind)(**arguments)

    def close(self) -> None:
        return None


class ToolOptions(Section):
    """Options of a tool; `kind` says of which."""

    kind: str
    name: str = Field(default="", pattern=r"^[A-Za-z_]?[A-Za-z0-9_]*$")
    """What the policy calls it; empty: its kind."""
    description: str = ""
    """What the policy reads about it; empty: the tool's own words."""
    session: ClassVar[type[Session]]

    def needs(self) -> tuple[str, ...]:
        """Columns that every problem must have."""
        return ()

    def deterministic(self) -> bool:
        """Equal calls after equal calls get equal answers."""
        return True

    def check(self, seconds: float) -> list[str]:
        """Cheap checks before a run: messages for the user. `seconds`: environment.step_timeout_seconds."""
        return []

    def prepare(self) -> Any:
        """Called once per process. Raises UserError."""
        return None

    def words(self) -> str:
        """What the policy reads about it where the method's docstring does not say it; empty: the docstring."""
        return ""

    def tools(self, shared: Any) -> tuple[Tool, ...]:
        (own,) = tools_of(self.session)
        described = self.description or self.words() or own.description
        return (replace(own, name=self.name or own.name, description=described),)
