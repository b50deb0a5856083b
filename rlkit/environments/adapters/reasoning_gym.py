"""`environment=reasoning_gym`: a question from reasoning-gym, with another try after a wrong answer."""

from __future__ import annotations

import importlib
from typing import Literal

from pydantic import Field

from rewards.services.answers import tagged_answer
from rewards.services.reasoning_gym import COLUMN, score_answer
from rlkit.environments.base import Action, Environment, EnvironmentConfig, EnvironmentNeeds, Step, Task
from rlkit.experience.extras import lacking


class ReasoningGymConfig(EnvironmentConfig):
    max_turns: int = Field(default=3, ge=1)
    """Answers per question."""
    answer_in: Literal["answer_tag", "response"] = "answer_tag"
    """Where the answer is: in the last <answer>, as data.instructions ask for, or in the whole turn."""


class ReasoningGym(Environment):
    """A turn earns what its answer scores above the best earlier answer, so the episode's total is its best score.

    A score of 1 ends the episode.
    """

    Config = ReasoningGymConfig
    config: ReasoningGymConfig

    @classmethod
    def needs(cls, config: ReasoningGymConfig) -> EnvironmentNeeds:
        return EnvironmentNeeds(columns=(COLUMN,))

    @classmethod
    def check(cls, config: ReasoningGymConfig) -> list[str]:
        return lacking("reasoning_gym")

    @classmethod
    def prepare(cls, config: ReasoningGymConfig) -> None:
        importlib.import_module("reasoning_gym")  # takes seconds

    def reset(self, task: Task, seed: int) -> None:
        self.entry = task.columns[COLUMN]
        self.best = 0.0

    def step(self, action: Action) -> Step:
        answer = action.text.strip() if self.config.answer_in == "response" else tagged_answer(action.text)
        score = score_answer(self.entry, answer)
        gain = max(score - self.best, 0.0)
        self.best += gain
        if score >= 1:
            return Step(reward=gain, done=True, success=True)
        if answer is None:
            said = "There is no answer between <answer> and </answer>."
        else:
            said = "That is not right." if score <= 0 else f"That is not quite right: it scores {score:.2f} of 1."
        return Step(f"{said} Try again.", reward=gain, success=False)
