"""Scripted players of the games, who often play badly, and what they say as token ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.data.rendering import ChatTemplate
from rlkit.environments.base import Action, Environment, EnvironmentContext, Task, as_messages, first_messages, settled
from rlkit.environments.games.calculator import Calculator
from rlkit.environments.games.guess_number import GuessNumber
from rlkit.environments.games.hidden_facts import ANIMALS, COLOURS, HiddenFacts
from rlkit.environments.games.maze import MOVES, Maze, beside, distances
from rlkit.experience import Episode, Message, Sample, ToolCall
from rlkit.rollout.conversation import Conversation, as_sample
from rlkit.rollout.rendering import Renderer
from rlkit.rollout.requests import Response

MAX_EPISODE_TOKENS = 512
Moves = Generator[Action, str, None]
"""Yields actions; is sent the environment's answers."""


def guess_number(task: Task, sensible: float, rng: random.Random) -> Moves:
    """Halve the remaining interval, else guess anything."""
    low, high = task.columns["low"], task.columns["high"]
    while True:
        anything = rng.randint(task.columns["low"], task.columns["high"])
        guess = (low + high) // 2 if rng.random() < sensible else anything
        if (yield Action(str(guess))) == "higher":
            low = max(low, guess + 1)
        else:
            high = min(high, guess - 1)


def calculator(task: Task, sensible: float, rng: random.Random) -> Moves:
    """Call the tool and repeat its answer; else misread the expression, or answer anything."""
    heard, expression = "", task.columns["expression"]
    while True:
        careful = rng.random() < sensible
        if careful and heard:
            yield Action(heard)
        elif careful or rng.random() < 0.5:
            heard = yield _call("calc", expression=expression if careful else _misread(expression, rng))
        else:
            yield Action(str(rng.randint(100, 9999)))


def hidden_facts(task: Task, sensible: float, rng: random.Random) -> Moves:
    """Ask and repeat the answer; else ask about anything, or answer anything."""
    known, animal = "", task.columns["animal"]
    while True:
        careful = rng.random() < sensible
        if careful and known:
            yield Action(known)
        elif careful or rng.random() < 0.5:
            about = animal if careful else rng.choice(ANIMALS)
            heard = yield _call("ask", about=about)
            known = heard if about == animal else known
        else:
            yield Action(rng.choice(COLOURS))


def maze(task: Task, sensible: float, rng: random.Random) -> Moves:
    """Take a shortest path, else move anywhere."""
    passages, cell = task.columns["open"], task.columns["start"]
    left = distances(passages, task.columns["goal"])
    while True:
        best = min(passages[cell], key=lambda move: left[beside(cell, move)])
        move = best if rng.random() < sensible else rng.choice(list(MOVES))
        yield Action(move)
        cell = beside(cell, move) if move in passages[cell] else cell


def _misread(expression: str, rng: random.Random) -> str:
    """Replace one number of the expression by another."""
    numbers = expression.replace("-", "+").replace("*", "+").split("+")
    place = rng.randrange(len(numbers))
    return expression.replace(numbers[place], str(rng.randint(11, 99)), 1)


def _call(name: str, **arguments: Any) -> Action:
    return Action("", (ToolCall(name, arguments),))


@dataclass(frozen=True)
class Game:
    name: str
    environment: type[Environment]
    player: Callable[[Task, float, random.Random], Moves]

    def tasks(self, split: Any, **options: int) -> Sequence[Task]:
        """Return its tasks, with those of the options that the environment has."""
        known = {name: value for name, value in options.items() if name in self.environment.Config.model_fields}
        return self.environment.tasks(self.environment.Config(**known), split, TASK_SEED) or ()


TASK_SEED = 2026
GAMES = (
    Game("guess_number", GuessNumber, guess_number),
    Game("calculator", Calculator, calculator),
    Game("hidden_facts", HiddenFacts, hidden_facts),
    Game("maze", Maze, maze),
)


class Writer:
    """Produces the token ids of conversations with a game, as in its episodes."""

    def __init__(self, template: ChatTemplate, game: Game) -> None:
        tools = game.environment.tools(game.environment.Config(), None)
        self.template = template
        self.renderer = Renderer(template, tools, [template.tokenizer.eos_token_id])  # type: ignore[list-item]
        self.context = EnvironmentContext(tools)

    def turn(self, action: Action) -> list[int]:
        """Return the token ids that the policy would sample for this action."""
        asks = Message("user", "")
        said = Message("assistant", action.text, calls=action.calls)
        before, whole = (
            str(text)
            for chat, ask in (([asks], True), ([asks, said], False))
            for text in self.template.texts([chat], ask=ask)
        )
        return self.template.token_ids([whole.removeprefix(before)])[0]


class Match:
    """One episode of a game, played by calls to `turn`."""

    def __init__(self, game: Game, task: Task, writer: Writer) -> None:
        self.config = game.environment.Config()
        self.environment = game.environment(self.config, writer.context)
        self.task, self.renderer = task, writer.renderer
        self.heard, self.done, self.success, self.reward, self.turns = "", False, False, 0.0, 0

    async def begin(self) -> None:
        opening = await settled(self.environment.reset(self.task, 0))
        self.prompt = self.renderer.whole(first_messages(self.task, opening))
        self.conversation = Conversation(self.prompt, MAX_EPISODE_TOKENS)

    async def turn(self, ids: Sequence[int], cut: bool = False) -> None:
        text, calls = self.renderer.parse(ids)
        tokens, none = np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.float32)
        response = Response("", tokens, none, "length" if cut else "stop", 0, np.zeros(len(tokens), np.int32))
        self.conversation.sampled(response, text, calls)
        last = self.turns + 1 == self.config.max_turns
        step = await settled(self.environment.step(Action(text, calls, self.turns, last)))
        self.turns += 1
        self.reward += step.reward
        self.success = bool(step.success)
        said = as_messages(step.observation)
        self.done = step.done or last or not self.conversation.observed(self.renderer.bridge(ids, said), said)
        self.heard = said[-1].content if said else ""

    def sample(self) -> Sample:
        return as_sample([self.conversation], 0, 0, Episode("done"))


async def scripted(game: Game, task: Task, writer: Writer, sensible: float, rng: random.Random) -> Match:
    """Play a whole episode with the scripted player, whose moves are sensible with this probability."""
    match = Match(game, task, writer)
    await match.begin()
    moves = game.player(task, sensible, rng)
    action = next(moves)
    while True:
        await match.turn(writer.turn(action))
        if match.done:
            return match
        action = moves.send(match.heard)
