"""What is wrong with a configuration: problems are collected, and reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing the user has to change (or, as a warning, to know)."""

    where: str
    """The key with the value given (`trainer.total_steps=0`), or the argument as it was typed."""
    message: str
    """What is wrong with it, and what would be right."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class ConfigError(ValueError):
    """A configuration that cannot run. `problems` lists everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.report())

    def report(self) -> str:
        """The text for the user: a headline, then one line per problem."""
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = [f"rlkit: {head} in the configuration", *(f"  - {problem}" for problem in self.problems)]
        return "\n".join(
            [*lines, "Nothing was started. `--help` lists every key; `dry_run=true` checks without running."]
        )
