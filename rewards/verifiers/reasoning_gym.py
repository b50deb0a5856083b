"""`reward=reasoning_gym`: each reasoning-gym data set judges the answers to its own questions."""

from __future__ import annotations

from typing import Any

from rewards.base import RewardTraits
from rewards.services.reasoning_gym import COLUMN, score_answer
from rewards.verifiers.match import AnswerIn, find_answer
from rewards.verifiers.pool import CannotJudgeError, TextRule, TextRuleConfig, excerpt
from rlkit.experience import Prompt, Score
from rlkit.experience.extras import lacking


class ReasoningGymReward(TextRule):
    """The data set's own `score_answer`, from 0 to 1; its questions come from `data=reasoning_gym`."""

    class Config(TextRuleConfig):
        answer_in: AnswerIn = "answer_tag"
        """Where the answer is. answer_tag: in the last <answer> tag, as data.instructions asks; final_answer: marked by
        `####`, `answer is` or a box; response: the whole response."""

    imports = ("reasoning_gym",)

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(columns=(COLUMN,), uses_gpu=False)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        return super().check(config) + lacking("reasoning_gym")

    def task(self, prompt: Prompt) -> str:
        column = prompt.columns.get(COLUMN)
        if not isinstance(column, str):
            raise CannotJudgeError(f"no_column: the prompt has nothing in column {COLUMN!r}")
        return column

    @staticmethod
    def judge(config: Any, task: str, text: str, /) -> Score:
        answer = find_answer(text, config.answer_in)
        value = score_answer(task, answer)
        components = {"correct": float(value >= 1), "format": float(answer is not None)}
        trace = f"no {config.answer_in} found" if answer is None else f"answer {excerpt(answer)}, score {value:g}"
        return Score(value, components=components, trace=trace)
