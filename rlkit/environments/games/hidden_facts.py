"""Ask before you answer: facts that differ from task to task, and a tool that tells them.

environment  What colour is the fox?
policy       ask(about="fox")
tool         green
policy       green
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from rlkit.environments.base import Action, Environment, Step, Task
from rlkit.environments.games.drawing import DrawnConfig, drawn
from rlkit.environments.tool import tool
from rlkit.experience import Message

ANIMALS = ("fox", "hen", "cat", "dog", "cow", "pig", "owl", "bee")
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
ASKED = 0.1


class HiddenFactsConfig(DrawnConfig):
    max_turns: int = Field(default=3, ge=1)
    """Calls, plus the answer."""


class HiddenFacts(Environment):
    """The right answer earns 0.9, and having asked the right question earns 0.1, however often; both are paid at the
    answer.

    So a wrong answer without asking earns nothing, and asking pays before the policy can use what it hears.

    >>> task = HiddenFacts.tasks(HiddenFacts.Config(), "heldout", seed=0)[0]
    >>> task.messages[0].content, task.answer
    ('What colour is the hen?', 'red')
    """

    Config = HiddenFactsConfig
    config: HiddenFactsConfig

    @classmethod
    def tasks(cls, config: HiddenFactsConfig, split: Literal["train", "heldout"], seed: int) -> Sequence[Task]:
        return [
            _task(*game)
            for game in drawn(_draw, lambda game: " ".join((game[0], *game[1])), split, seed, config.tasks_of(split))
        ]

    def reset(self, task: Task, seed: int) -> None:
        self.animal, self.colours = task.columns["animal"], task.columns["colours"]
        self.asked = False

    @tool
    def ask(self, about: str) -> str:
        """Ask for an animal's colour.

        about: the animal
        """
        self.asked |= about == self.animal
        return str(self.colours.get(about, f"there is no {about}"))

    async def run_tools(self, action: Action) -> Step:
        return replace(await super().run_tools(action), success=False)  # in case no turn is left to answer

    def final(self, action: Action) -> Step:
        right = action.text.strip() == self.colours[self.animal]
        return Step(reward=(1 - ASKED) * right + ASKED * self.asked, done=True, success=right)


def _draw(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Draw the animal to ask about, and the animals' colours."""
    return rng.choice(ANIMALS), tuple(rng.sample(COLOURS, len(COLOURS)))


def _task(animal: str, colours: tuple[str, ...]) -> Task:
    question = Message("user", f"What colour is the {animal}?")
    facts = dict(zip(ANIMALS, colours, strict=True))
    columns = {"animal": animal, "colours": facts}
    return Task(f"hidden_facts/{animal}:{','.join(colours)}", (question,), answer=facts[animal], columns=columns)
