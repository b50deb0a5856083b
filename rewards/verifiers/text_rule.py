"""What rule rewards on one text have in common: the judging runs in processes that are killed when they hang."""

from __future__ import annotations

import importlib
import json
import time
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from rewards.base import Reward, RewardConfig, RewardContext
from rlkit.experience import Group, GroupScores, Prompt, Score

if TYPE_CHECKING:
    from rewards.verifiers.pool import Processes

MAX_TRACE_CHARACTERS = 400
"""Longer extracts are cut in traces."""


class TextRuleConfig(RewardConfig):
    """Fields of every rule that judges in processes of its own."""

    item_timeout_seconds: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Deadline of one verdict; then its process is killed and replaced and the sample is invalid."""
    processes: int = Field(default=1, ge=1)
    """Verifier processes of one worker."""


class CannotJudgeError(Exception):
    """A prompt lacks what the rule needs, or has it in a form that cannot be used: `class: details`."""


class JudgeFunction(Protocol):
    """`(config, task, text) -> Score`, the static method `judge` of a rule; runs in a verifier process."""

    def __call__(self, config: Any, task: Any, text: str, /) -> Score: ...


class TextRule(Reward):
    """A verdict per response from its text and its prompt alone.

    Subclasses say in `task` what the verdict needs of the prompt (plain data, sent to the process), and in the static
    method `judge` what it is. Whatever `judge` raises on model-written text makes that sample invalid, not wrong.
    """

    Config = TextRuleConfig

    @classmethod
    def uses_gpu(cls, config: Any) -> bool:
        """No: its verdicts are made by programs."""
        return False

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._processes: Processes | None = None

    @abstractmethod
    def task(self, prompt: Prompt) -> Any:
        """What `judge` needs to know of the prompt; raises CannotJudgeError if it is not there."""

    @staticmethod
    @abstractmethod
    def judge(config: Any, task: Any, text: str, /) -> Score:
        """The score of one response."""

    def start(self) -> None:
        """Start the processes. Raises RuntimeError with the cause if they do not come up."""
        from rewards.verifiers.pool import Failed

        (answer,) = self._open().map(_echo, ["ready"], time.monotonic() + 60.0, 60.0)
        if isinstance(answer, Failed):
            raise RuntimeError(f"the verifier processes of {type(self).__name__} do not start: {answer.reason}")

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Judge every response."""
        scores: list[list[Score | None]] = []
        places: list[tuple[int, int]] = []
        items: list[tuple[Any, str]] = []
        for row, group in enumerate(groups):
            try:
                task = self.task(group.prompt)
            except CannotJudgeError as error:
                scores.append([Score.invalid(str(error))] * len(group.samples))
                continue
            scores.append([None] * len(group.samples))
            places += [(row, column) for column in range(len(group.samples))]
            items += [(task, sample.text) for sample in group.samples]
        for (row, column), score in zip(places, self._judge_all(items), strict=True):
            scores[row][column] = score
        return [GroupScores(tuple(score for score in row if score is not None)) for row in scores]

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            self._processes.close()

    def _judge_all(self, items: Sequence[tuple[Any, str]]) -> list[Score]:
        if not items:
            return []
        from rewards.verifiers.pool import Failed

        # A fifth of the call's deadline is kept for everything else, so that the processes give up before it is over.
        deadline = time.monotonic() + 0.8 * self.config.timeout_seconds
        function = partial(_judge_texts, type(self).judge, self.config)
        results = self._open().map(function, items, deadline, self.config.item_timeout_seconds)
        return [Score.invalid(result.reason) if isinstance(result, Failed) else result for result in results]

    def _open(self) -> Processes:
        if self._processes is None:
            from rewards.verifiers.pool import Processes  # pebble and multiprocessing load only where a reward runs

            module = type(self).__module__
            self._processes = Processes(self.config.processes, _prepare, [module], [module])
        return self._processes


def excerpt(text: str) -> str:
    """A text for a trace: quoted, cut in the middle if it is long."""
    if len(text) > MAX_TRACE_CHARACTERS:
        half = MAX_TRACE_CHARACTERS // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return repr(text)


def column_value(prompt: Prompt, column: str) -> Any:
    """A data column; texts that hold JSON lists or objects are parsed. Raises CannotJudgeError if it is not there."""
    value = prompt.columns.get(column)
    if value is None:
        raise CannotJudgeError(f"no_column: the prompt has nothing in column {column!r}")
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise CannotJudgeError(f"bad_column: column {column!r} looks like JSON but is not: {error}") from error
    return value


def _prepare(module: str) -> None:
    from rewards.verifiers.pool import die_with_parent, limit_memory

    die_with_parent()
    importlib.import_module(module)
    limit_memory()


def _echo(items: Sequence[str]) -> list[str]:
    return list(items)


def _judge_texts(judge: JudgeFunction, config: Any, items: Sequence[tuple[Any, str]]) -> list[Score]:
    return [_judge_text(judge, config, task, text) for task, text in items]


def _judge_text(judge: JudgeFunction, config: Any, task: Any, text: str) -> Score:
    try:
        return judge(config, task, text)
    except CannotJudgeError as error:
        return Score.invalid(str(error))
    except Exception as error:  # whatever a parser does on model-written text is this sample's verdict, not a crash
        return Score.invalid(f"exception: {type(error).__name__}: {str(error)[:200]}", excerpt(text))
