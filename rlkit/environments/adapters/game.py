"""Games of other packages: drawn by the seed of a task, played as text, with random numbers of their own."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from rlkit.environments.base import Action, Environment, EnvironmentContext, EnvironmentNeeds, Step, Task
from rlkit.environments.games.drawing import DrawnConfig, Split, drawn
from rlkit.experience.extras import lacking


class GameConfig(DrawnConfig):
    name: str
    """Name of the game in its package."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments for creating the game."""


class Game(Environment):
    """The task's seed draws the game; the episode's seed draws what happens by chance while it is played.

    During each call, Python's and numpy's global random numbers, which some packages use, are the episode's own.
    """

    Config = GameConfig
    config: GameConfig
    package: ClassVar[str]
    """Name of the module and of rlkit's extra."""

    @classmethod
    def needs(cls, config: GameConfig) -> EnvironmentNeeds:
        return EnvironmentNeeds(columns=("seed",))

    @classmethod
    def check(cls, config: GameConfig) -> list[str]:
        """Start one game: it may lack something it needs, or be for another number of players."""
        if missing := lacking(cls.package):
            return missing
        trial = cls(config, EnvironmentContext())
        try:
            trial.reset(Task("trial", columns={"seed": 0}), 0)
            trial.close()
        except Exception as error:
            why = " ".join(str(error).split())
            return [f"{cls.package} cannot start {config.name!r}: {type(error).__name__}: {why:.300}"]
        return []

    @classmethod
    def prepare(cls, config: GameConfig) -> None:
        importlib.import_module(cls.package)  # some packages take seconds

    @classmethod
    def tasks(cls, config: GameConfig, split: Split, seed: int) -> Sequence[Task]:
        return seeded_tasks(config, config.name, split, seed)

    def reset(self, task: Task, seed: int) -> str:
        drawing = int(task.columns["seed"])
        self._random = GlobalRandom(drawing)
        with self._random:
            opening = self.begin(drawing)
        self._random = GlobalRandom(seed)
        self.chance(seed)
        return opening

    def step(self, action: Action) -> Step:
        with self._random:
            return self.play(action.text)

    def begin(self, seed: int) -> str:
        """Draw the game; return the text that the policy reads first."""
        raise NotImplementedError

    def chance(self, seed: int) -> None:
        """Use this seed from here on; for games with random numbers of their own."""

    def play(self, text: str) -> Step:
        raise NotImplementedError


def seeded_tasks(config: DrawnConfig, name: str, split: Split, seed: int) -> list[Task]:
    """Tasks that differ in their seeds; no seed is in both splits."""
    seeds = drawn(lambda rng: rng.randrange(2**31), str, split, seed, config.tasks_of(split))
    return [Task(f"{name}/{one}", columns={"seed": one}) for one in seeds]


class GlobalRandom:
    """Python's and numpy's global random numbers of one episode, active within `with`."""

    def __init__(self, seed: int) -> None:
        others = _state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self._own = _state()
        _set(others)

    def __enter__(self) -> None:
        self._others = _state()
        _set(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = _state()
        _set(self._others)


def _state() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
