"""A number between two bounds, and whether it is higher or lower than a guess.

environment  Guess my number from 7 to 22.
policy       14
environment  lower
policy       10
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rlkit.environments.base import Action, Environment, EnvironmentConfig, Step, Task
from rlkit.environments.games.drawing import of_split
from rlkit.experience import Message


class GuessNumberConfig(EnvironmentConfig):
    max_turns: int = Field(default=5, ge=1)
    """Maximum number of guesses."""
    numbers: int = Field(default=16, ge=2)
    """How many numbers the bounds enclose, bounds included; 16 take at most 5 guesses."""
    max_number: int = Field(default=32, ge=2, le=99)
    """Largest upper bound; lower bounds start at 1."""


class GuessNumber(Environment):
    """A hit earns 1, and 0.1 less for each guess before it.

    >>> task = GuessNumber.tasks(GuessNumber.Config(), "heldout", seed=0)[0]
    >>> task.messages[0].content, task.columns["number"]
    ('Guess my number from 17 to 32.', 17)
    """

    Config = GuessNumberConfig
    config: GuessNumberConfig

    @classmethod
    def tasks(cls, config: GuessNumberConfig, split: Literal["train", "heldout"], seed: int) -> Sequence[Task]:
        lowest = range(1, config.max_number - config.numbers + 2)
        games = [(low, low + config.numbers - 1, low + i) for low in lowest for i in range(config.numbers)]
        tasks = of_split(games, lambda game: "{}-{}:{}".format(*game), split)
        random.Random(f"{seed}/{split}").shuffle(tasks)
        return [_task(*game) for game in tasks]

    def reset(self, task: Task, seed: int) -> None:
        self.low, self.high, self.number = (task.columns[name] for name in ("low", "high", "number"))

    def step(self, action: Action) -> Step:
        guess = re.fullmatch(r"\s*(\d{1,9})\s*", action.text, re.ASCII)
        if not guess or not self.low <= int(guess[1]) <= self.high:
            return Step(f"Say a number from {self.low} to {self.high}.", success=False)
        if int(guess[1]) == self.number:
            return Step(reward=1.0 - 0.1 * action.turn, done=True, success=True)
        return Step("higher" if int(guess[1]) < self.number else "lower", success=False)


def _task(low: int, high: int, number: int) -> Task:
    opening = Message("user", f"Guess my number from {low} to {high}.")
    columns = {"low": low, "high": high, "number": number}
    return Task(f"guess_number/{low}-{high}:{number}", (opening,), answer=str(number), columns=columns)
