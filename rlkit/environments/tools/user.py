"""The tool `user`: someone who knows what the prompt leaves out, and says it when asked for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlkit.environments.base import EnvironmentFailure, Step, Task
from rlkit.environments.tool import tool
from rlkit.environments.tools.base import Session, ToolOptions

UNKNOWN = "I can't say."


class UserSession(Session):
    def __init__(self, options: User, shared: Any, task: Task, seconds: float) -> None:
        super().__init__(options, shared, task, seconds)
        self.facts = _facts(task.columns.get(options.facts), options.facts)
        self.told: set[str] = set()

    @tool
    def user(self, about: str) -> Step:
        """Ask the user for something that you need to know.

        about: what you want to know, one thing at a time
        """
        touched = [keys for keys in self.facts if _is_named(keys, about)]
        touched.sort(key=lambda keys: keys in self.told)  # what is new first
        said = touched[: self.options.facts_per_question]
        new = set(said) - self.told
        self.told |= new
        return Step(
            " ".join(self.facts[keys] for keys in said) or UNKNOWN,
            reward=len(new) / len(self.facts) - self.options.cost,
            metrics={"elicited": len(self.told) / len(self.facts)},
        )


class User(ToolOptions):
    kind: Literal["user"] = "user"
    session: ClassVar[type[Session]] = UserSession
    facts: str = "facts"
    """Data column of what the user knows: {"budget, price": "At most 300.", ...}. A question that has one of the words
    before a colon gets what is behind it."""
    cost: float = Field(default=0.02, ge=0)
    """Of a question, taken off what it earns: the share of the facts that it brings to light for the first time."""
    facts_per_question: int = Field(default=1, ge=1)
    """Facts that one question gets, at most: without a bound, a list of all words would be the best question."""

    def needs(self) -> tuple[str, ...]:
        return (self.facts,)


def _facts(cell: Any, column: str) -> Mapping[str, str]:
    texts = isinstance(cell, Mapping) and all(isinstance(one, str) for pair in cell.items() for one in pair)
    if not texts or not cell:
        raise EnvironmentFailure(f"{column} must be an object of words and texts, not {cell!r:.80}")
    facts: Mapping[str, str] = cell
    return facts


def _is_named(keys: str, question: str) -> bool:
    """Whether one of the keys, separated by commas, is in the question as whole words."""
    plain = _words(question)
    return any(f" {_words(key).strip()} " in plain for key in keys.split(",") if _words(key).strip())


def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.casefold())) + " "
