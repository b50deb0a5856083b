"""The embedded games, move by move."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from rlkit.environments.base import Action, Environment, EnvironmentContext, Step, Task, settled
from rlkit.environments.games.calculator import Calculator, value
from rlkit.environments.games.gaming import Gaming
from rlkit.environments.games.guess_number import GuessNumber
from rlkit.environments.games.hidden_facts import ANIMALS, COLOURS, HiddenFacts
from rlkit.environments.games.maze import MOVES, Maze, beside, distances, name_of
from rlkit.experience import ToolCall

GAMES: tuple[type[Environment], ...] = (GuessNumber, Calculator, HiddenFacts, Maze, Gaming)


def begin(game: type[Environment], task: Task | dict[str, Any]) -> Environment:
    if isinstance(task, dict):
        task = Task("", answer=task.pop("answer", None), columns=task)
    config = game.Config(placement="inline")
    environment = game(config, EnvironmentContext(game.tools(config, None)))
    assert environment.reset(task, 0) is None  # the task's own messages are the opening
    return environment


def act(environment: Environment, text: str = "", turn: int = 0) -> Step:
    return asyncio.run(settled_step(environment, Action(text, (), turn)))


def call(environment: Environment, **arguments: Any) -> Step:
    name = environment.context.tools[0].name
    return asyncio.run(settled_step(environment, Action("", (ToolCall(name, arguments),))))


async def settled_step(environment: Environment, action: Action) -> Step:
    step: Step = await settled(environment.step(action))
    return step


def said(step: Step) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in step.observation]  # type: ignore[union-attr]


# -- tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", GAMES)
def test_tasks_depend_on_the_seed_alone_and_held_out_ones_are_never_trained_on(game: type[Environment]) -> None:
    sizes = {"train_tasks": 100, "heldout_tasks": 20} if "train_tasks" in game.Config.model_fields else {}
    config = game.Config(**sizes)
    heldout = game.tasks(config, "heldout", 0)
    assert heldout == game.tasks(config, "heldout", 0) and heldout
    assert len({task.id for task in heldout}) == len(heldout)
    assert [task.id for task in heldout] != [task.id for task in game.tasks(config, "heldout", 1)]
    for seed in range(3):
        assert not {task.id for task in game.tasks(config, "train", seed)} & {task.id for task in heldout}
    if sizes:
        assert (len(game.tasks(config, "train", 0)), len(heldout)) == (100, 20)


@pytest.mark.parametrize("game", GAMES)
def test_equal_moves_get_equal_answers(game: type[Environment]) -> None:
    task = game.tasks(game.Config(), "heldout", 0)[0]
    words = [*MOVES, "3", "7", "what?", "red"]

    def transcript() -> list[Step]:
        environment, rng = begin(game, task), random.Random(0)
        steps = [act(environment, rng.choice(words), turn) for turn in range(4)]
        return [*steps, *([call(environment, expression="1+1")] if environment.context.tools else [])]

    assert transcript() == transcript()
    assert game.deterministic(game.Config())


def test_all_numbers_of_all_bounds_are_tasks_once() -> None:
    tasks = [task for split in ("train", "heldout") for task in GuessNumber.tasks(GuessNumber.Config(), split, 0)]
    games = {(task.columns["low"], task.columns["high"], task.columns["number"]) for task in tasks}
    assert games == {(low, low + 15, low + i) for low in range(1, 18) for i in range(16)} and len(tasks) == len(games)


# -- guess_number --------------------------------------------------------------------------------------------------


def test_a_guess_is_told_apart_and_a_hit_earns_less_the_later() -> None:
    game = begin(GuessNumber, {"low": 7, "high": 22, "number": 11})
    assert act(game, "14") == Step("lower", success=False)
    assert act(game, " 9\n", 1) == Step("higher", success=False)
    assert act(game, "11", 2) == Step(reward=pytest.approx(0.8), done=True, success=True)
    for text in ("", "23", "6", "eleven", "9 or 11", "-9", "9" * 5000, "٩"):
        assert act(game, text) == Step("Say a number from 7 to 22.", success=False), text


# -- calculator ----------------------------------------------------------------------------------------------------


def test_expressions_are_worked_out_and_nothing_else_is() -> None:
    assert value("17*23-45") == 346 and value(" 2*(3+-4) ") == -2
    for text in ("", "2**9", "1/2", "1.5", "a", "f(1)", "1 2", "(" * 60, "9*" * 40 + "9", "True", "1;2", "\0"):
        with pytest.raises(ValueError, match=r"expression|numbers|longer|null"):
            value(text)


def test_only_the_last_answer_is_judged() -> None:
    game = begin(Calculator, {"expression": "17*23-45", "answer": "346"})
    (tool,) = game.context.tools
    assert tool.name == "calc" and list(tool.parameters["properties"]) == ["expression"]
    step = call(game, expression="17*23-45")
    assert (said(step), step.done, step.reward, step.success) == ([("tool", "346")], False, 0.0, False)
    (answer,) = said(call(game, expression="17*"))
    assert answer == ("tool", "error: ValueError: '17*' is no expression")
    assert said(call(game, what="1"))[0][1].startswith("error: expression: Field required")
    assert act(game, " 346 ") == Step(reward=1.0, done=True, success=True)
    assert act(game, "The answer is 346") == Step(reward=0.0, done=True, success=False)


def test_no_answer_is_guessed_from_few() -> None:
    answers = {task.answer for task in Calculator.tasks(Calculator.Config(train_tasks=500), "train", 0)}
    assert len(answers) > 450


# -- hidden_facts --------------------------------------------------------------------------------------------------


def test_asking_is_paid_once_and_a_wrong_answer_without_it_is_not() -> None:
    columns = {"animal": "fox", "colours": dict(zip(ANIMALS, COLOURS, strict=True)), "answer": "red"}
    earned = {}
    for questions in ((), ("fox",), ("fox", "fox"), ("hen",)):
        for answer in ("red", "blue"):
            game = begin(HiddenFacts, {**columns})
            heard = [said(call(game, about=animal)) for animal in questions]
            assert heard == [[("tool", columns["colours"][animal])] for animal in questions]
            step = act(game, answer)
            assert step.done and step.success == (answer == "red")
            earned[questions, answer] = step.reward
    assert earned[(), "blue"] == 0.0 and earned[("hen",), "blue"] == 0.0
    assert earned[("fox",), "red"] == 1.0 and earned[("fox", "fox"), "red"] == 1.0
    assert earned[("fox", "fox"), "blue"] == earned[("fox",), "blue"] == 0.1
    assert earned[(), "red"] == earned[("hen",), "red"] == 0.9
    assert said(call(begin(HiddenFacts, {**columns}), about="dragon")) == [("tool", "there is no dragon")]


def test_what_was_asked_says_nothing_about_the_answer() -> None:
    tasks = HiddenFacts.tasks(HiddenFacts.Config(), "train", 0)
    for animal in ANIMALS:
        answers = [task.answer for task in tasks if task.columns["animal"] == animal]
        assert max(answers.count(colour) for colour in COLOURS) < 0.3 * len(answers)


# -- maze ----------------------------------------------------------------------------------------------------------

PASSAGES = {"a1": ["north"], "a2": ["east", "south"], "b1": [], "b2": ["west"]}


def test_walls_stop_and_the_state_is_the_cell_a_move_began_in() -> None:
    game = begin(Maze, {"open": PASSAGES, "start": "a1", "goal": "b2"})

    def cell(near: float, said: str, state: str) -> Step:
        return Step(said, success=False, state=state, metrics={"nearness": near})

    assert act(game, "east") == cell(0.0, "a1: north", "a1")
    assert act(game, "up") == cell(0.0, "Say north, east, south or west.", "a1")
    assert act(game, "north") == cell(0.5, "a2: east, south", "a1")
    assert act(game, "south") == cell(0.0, "a1: north", "a2")
    assert act(game, "north") == cell(0.5, "a2: east, south", "a1")
    assert act(game, "east") == Step(reward=1.0, done=True, success=True, state="a2", metrics={"nearness": 1.0})


def test_distances_are_those_of_shortest_ways() -> None:
    assert distances(PASSAGES, "b2") == {"b2": 0, "a2": 1, "a1": 2}


@pytest.mark.parametrize("walls", [0.0, 0.4, 1.0])
def test_every_cell_can_be_reached_and_passages_go_both_ways(walls: float) -> None:
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    for task in Maze.tasks(Maze.Config(walls=walls, train_tasks=20), "train", 0):
        passages, start, goal = (task.columns[name] for name in ("open", "start", "goal"))
        assert set(passages) == {name_of((column, row)) for column in range(5) for row in range(5)}
        assert len(distances(passages, goal)) == 25
        for cell, moves in passages.items():
            assert all(back[move] in passages[beside(cell, move)] for move in moves)
        count = sum(map(len, passages.values())) // 2
        assert {0.0: count == 40, 1.0: count == 24}.get(walls, 24 < count < 40)
        assert abs(ord(start[0]) - ord(goal[0])) + abs(int(start[1]) - int(goal[1])) >= 3
        assert task.messages[0].content == f"Walk from {start} to {goal}. {start}: {', '.join(passages[start])}"


def test_a_smallest_maze_has_one_way() -> None:
    assert Maze.tasks(Maze.Config(size=2, walls=1.0, train_tasks=4), "train", 0)
