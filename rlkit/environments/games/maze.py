"""A walk through a maze in which only the current cell is visible.

environment  Walk from a2 to d5. a2: north, east
policy       north
environment  a3: south, east
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Literal

from pydantic import Field

from rlkit.environments.base import Action, Environment, Step, Task
from rlkit.environments.games.drawing import DrawnConfig, drawn
from rlkit.experience import Message

Cell = tuple[int, int]
"""Column and row, from the south-west corner (0, 0), which is a1."""
MOVES: dict[str, Cell] = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}


class MazeConfig(DrawnConfig):
    max_turns: int = Field(default=12, ge=1)
    """Maximum number of moves."""
    size: int = Field(default=5, ge=2, le=9)
    """Number of columns and of rows."""
    walls: float = Field(default=0.4, ge=0, le=1)
    """Share of the optional walls (those that cut nothing off) that are kept; 1: only one way between any two cells."""
    train_tasks: int = Field(default=1024, ge=1)
    """Mazes to train on."""


class Maze(Environment):
    """The goal earns 1. A turn's state is the cell it starts from; the metric `nearness` is the share of the shortest
    way covered so far, below 0 if the goal is farther than at the start.

    >>> task = Maze.tasks(Maze.Config(heldout_tasks=1), "heldout", seed=0)[0]
    >>> task.messages[0].content
    'Walk from e3 to c4. e3: north, west'
    """

    Config = MazeConfig
    config: MazeConfig

    @classmethod
    def tasks(cls, config: MazeConfig, split: Literal["train", "heldout"], seed: int) -> Sequence[Task]:
        return drawn(partial(_task, config), lambda task: task.id, split, seed, config.tasks_of(split))

    def reset(self, task: Task, seed: int) -> None:
        self.open: Mapping[str, Sequence[str]] = task.columns["open"]
        self.cell, self.goal = task.columns["start"], task.columns["goal"]
        self.far = distances(self.open, self.goal)
        self.whole_way = self.far[self.cell]

    def step(self, action: Action) -> Step:
        state, move = self.cell, action.text.strip()
        if move in self.open[state]:
            self.cell = beside(state, move)
        done = self.cell == self.goal
        said = seen(self.cell, self.open) if move in MOVES else "Say north, east, south or west."
        return Step(
            () if done else said,
            reward=float(done),
            done=done,
            success=done,
            state=state,
            metrics={"nearness": 1 - self.far[self.cell] / self.whole_way},
        )


def name_of(cell: Cell) -> str:
    return f"{'abcdefghi'[cell[0]]}{cell[1] + 1}"


def cell_of(name: str) -> Cell:
    return "abcdefghi".index(name[0]), int(name[1:]) - 1


def beside(name: str, move: str) -> str:
    (column, row), (right, up) = cell_of(name), MOVES[move]
    return name_of((column + right, row + up))


def seen(cell: str, open_: Mapping[str, Sequence[str]]) -> str:
    return f"{cell}: {', '.join(open_[cell])}"


def distances(open_: Mapping[str, Sequence[str]], goal: str) -> dict[str, int]:
    """Return the number of moves to the goal from each cell."""
    moves, cells = {goal: 0}, deque([goal])
    while cells:
        cell = cells.popleft()
        for neighbour in (beside(cell, move) for move in open_[cell]):
            if neighbour not in moves:
                moves[neighbour] = moves[cell] + 1
                cells.append(neighbour)
    return moves


def _task(config: MazeConfig, rng: random.Random) -> Task:
    open_ = _maze(config, rng)
    start, goal = rng.sample(list(open_), 2)
    while _apart(start, goal) <= config.size // 2:
        start, goal = rng.sample(list(open_), 2)
    walk = f"Walk from {start} to {goal}. {seen(start, open_)}"
    plan = "".join(f"{cell}{''.join(move[0] for move in moves)}" for cell, moves in open_.items())
    columns = {"open": open_, "start": start, "goal": goal}
    return Task(f"maze/{start}-{goal}:{plan}", (Message("user", walk),), columns=columns)


def _apart(cell: str, other: str) -> int:
    (column, row), (goal_column, goal_row) = cell_of(cell), cell_of(other)
    return abs(column - goal_column) + abs(row - goal_row)


def _maze(config: MazeConfig, rng: random.Random) -> dict[str, list[str]]:
    """Return the open moves from each cell: a random tree of passages, plus further ones."""
    beside_ = _neighbours(config.size)
    cells = list(beside_)
    passages: set[tuple[Cell, Cell]] = set()
    reached, edge = {cells[0]}, [(cells[0], other) for other in beside_[cells[0]]]
    while edge:
        cell, other = edge.pop(rng.randrange(len(edge)))
        if other not in reached:
            reached.add(other)
            passages |= {(cell, other), (other, cell)}
            edge += [(other, further) for further in beside_[other]]
    for cell in cells:
        for other in beside_[cell]:
            if cell < other and (cell, other) not in passages and rng.random() >= config.walls:
                passages |= {(cell, other), (other, cell)}
    return {
        name_of(cell): [m for m, (x, y) in MOVES.items() if (cell, (cell[0] + x, cell[1] + y)) in passages]
        for cell in cells
    }


@lru_cache
def _neighbours(size: int) -> Mapping[Cell, Sequence[Cell]]:
    cells = [(column, row) for column in range(size) for row in range(size)]
    return {
        (column, row): [c for right, up in MOVES.values() if (c := (column + right, row + up)) in cells]
        for column, row in cells
    }
