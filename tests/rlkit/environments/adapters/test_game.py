"""What the games of all packages share, without a package."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from rlkit.environments.adapters.game import Game, GameConfig
from rlkit.environments.base import Action, EnvironmentContext, Step, Task


class Dice(Game):
    """Draws from the global random numbers, as TextArena and GEM do."""

    package = "json"

    def begin(self, seed: int) -> str:
        if self.config.name == "bridge":
            raise ValueError("the number of\nplayers has to be 4")
        self.sides = random.randint(4, 1000)
        return f"{self.sides} sides"

    def play(self, text: str) -> Step:
        return Step(f"{random.randint(1, self.sides)} {np.random.randint(10**6)}")


def begun(seed: int, chance: int) -> tuple[Dice, str]:
    game = Dice(GameConfig(name="dice"), EnvironmentContext())
    return game, game.reset(Task("", columns={"seed": seed}), chance)


def said(game: Dice, turns: int = 3) -> list[Any]:
    return [game.step(Action("")).observation for _ in range(turns)]


def test_the_task_draws_the_game_and_the_episode_what_happens_in_it() -> None:
    (one, opening), (again, same), (other, third) = begun(3, 7), begun(3, 7), begun(3, 8)
    assert opening == same == third != begun(4, 7)[1]
    transcript = said(one)
    assert transcript == said(again) != said(other)


def test_episodes_side_by_side_draw_what_each_draws_alone() -> None:
    alone = [said(begun(seed, 1)[0]) for seed in range(3)]
    games = [begun(seed, 1)[0] for seed in range(3)]
    together: list[list[Any]] = [[] for _ in games]
    for _ in range(3):
        for game, heard in zip(games, together, strict=True):
            random.random()
            heard += said(game, 1)
    assert together == alone


def test_nobody_elses_random_numbers_change() -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    said(begun(1, 2)[0])
    assert (random.random(), np.random.random()) == expected


def test_no_seed_is_in_both_splits() -> None:
    config = GameConfig(name="dice", train_tasks=300, heldout_tasks=30)
    train = {task.columns["seed"] for seed in range(3) for task in Dice.tasks(config, "train", seed)}
    heldout = {task.columns["seed"] for seed in range(3) for task in Dice.tasks(config, "heldout", seed)}
    assert not train & heldout and (len(train), len(heldout)) == (900, 90)
    assert Dice.tasks(config, "train", 0) == Dice.tasks(config, "train", 0)


def test_what_cannot_be_played_is_said_before_a_run() -> None:
    assert Dice.check(GameConfig(name="dice")) == []
    (message,) = Dice.check(GameConfig(name="bridge"))
    assert message == "json cannot start 'bridge': ValueError: the number of players has to be 4"

    class Absent(Dice):
        package = "no_such_package"

    (message,) = Absent.check(GameConfig(name="dice"))
    assert message == "the package no_such_package is not installed: pip install 'rlkit[no_such_package]'"
