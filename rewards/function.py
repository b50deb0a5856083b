"""`reward=function`: a Python function `f(prompts, completions, **columns) -> list[float | None]`, as in TRL.

def brevity(completions, **columns):
    return [-len(completion) / 100 for completion in completions]

python -m rlkit.train reward=function reward.function=my_module.brevity
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rlkit.experience import Group, GroupScores, Prompt, Sample, Score, SpanReward, UserError
from rlkit.experience.names import NotFoundError, find_object

_EXCEPTION = "exception:"
ARGUMENTS = ("prompts", "completions", "completion_ids", "completion_steps", "references", "answer")


class FunctionReward(Reward):
    """Calls the function once for all samples of a scoring call; every argument is a list with one entry per sample.

    The function gets the arguments that it names, or all of them with `**columns`: `prompts`, `completions`,
    `completion_ids`, `completion_steps` and `references` (a list per sample), `answer` and the data columns. It returns
    a number per sample, or None for an invalid sample. If it raises, the samples are tried one by one, and those for
    which it raises again are invalid. If it raises for all of them, the call fails and is retried once, in a new
    process.
    """

    class Config(RewardConfig):
        function: str
        """Dotted path of the function: my_module.my_function. `async def` functions are awaited."""
        chat: bool = False
        """Pass prompts and completions as messages ({"role": ..., "content": ...}) instead of texts."""
        per_step: bool = False
        """The function returns a list of numbers per sample, one per step (`rollout.steps`); `completion_steps` has
        the steps' texts."""

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._function: RewardFunction | None = None

    @classmethod
    def check(cls, config: Any) -> list[str]:
        try:
            load_function(config.function)
        except FunctionError as error:
            return [str(error)]
        return []

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """Require what the function's arguments without a default need; nothing if it cannot be imported."""
        try:
            function = load_function(config.function)
        except FunctionError:
            return RewardTraits()
        return RewardTraits(
            references="references" in function.required,
            answer="answer" in function.required,
            columns=function.columns,
            process_rewards=config.per_step,
            outcome_rewards=not config.per_step,
            steps=config.per_step or "completion_steps" in function.required,
        )

    def start(self) -> None:
        self._function = load_function(self.config.function)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Score by the function; raise what it raises if it raises for every sample."""
        function = self._function
        if function is None:
            raise RuntimeError("start() was not called")
        pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
        lacking = [_missing(function, prompt) for prompt, _ in pairs]
        complete = [pair for pair, lack in zip(pairs, lacking, strict=True) if not lack]
        judgements = iter(self._judge(function, complete))
        scores = iter([Score.invalid(f"no_column: {lack}") if lack else next(judgements) for lack in lacking])
        return [GroupScores(tuple(next(scores) for _ in group.samples)) for group in groups]

    def _judge(self, function: RewardFunction, pairs: Sequence[tuple[Prompt, Sample]]) -> list[Score]:
        try:
            return self._call(function, pairs)
        except Exception as error:
            if len(pairs) < 2:
                raise
            of_all = error
        # Outside `except`, so that the traceback of one sample does not start with that of another.
        scores = [self._judge_alone(function, pair) for pair in pairs]
        if all(score.reason.startswith(_EXCEPTION) for score in scores):
            raise of_all  # it raised for every sample, so no single text is the cause
        return scores

    def _judge_alone(self, function: RewardFunction, pair: tuple[Prompt, Sample]) -> Score:
        try:
            return self._call(function, [pair])[0]
        except Exception as error:
            trace = traceback.format_exc(limit=20)
            return Score.invalid(f"{_EXCEPTION} {type(error).__name__}: {str(error)[:200]}", trace)

    def _call(self, function: RewardFunction, pairs: Sequence[tuple[Prompt, Sample]]) -> list[Score]:
        if not pairs:
            return []
        result = function.call(**self._arguments(function, pairs))
        if inspect.isawaitable(result):
            result = asyncio.run(_await(result))
        values = result.tolist() if hasattr(result, "tolist") else result  # numpy arrays and torch tensors
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            reason = f"wrong_type: {function.name} returned {_describe(values)}, not a list of {len(pairs)} numbers"
            return [Score.invalid(reason)] * len(pairs)
        if len(values) != len(pairs):
            reason = f"wrong_length: {function.name} returned {len(values)} values for {len(pairs)} completions"
            return [Score.invalid(reason)] * len(pairs)
        if self.config.per_step:
            samples = (sample for _, sample in pairs)
            return [_step_scores(value, sample, function.name) for value, sample in zip(values, samples, strict=True)]
        return [_score(value, function.name) for value in values]

    def _arguments(self, function: RewardFunction, pairs: Sequence[tuple[Prompt, Sample]]) -> dict[str, list[Any]]:
        columns = dict.fromkeys(name for prompt, _ in pairs for name in prompt.columns)
        arguments: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt, _ in pairs] for name in columns}
        arguments |= {
            "prompts": [_prompt(prompt, self.config.chat) for prompt, _ in pairs],
            "completions": [_completion(sample, self.config.chat) for _, sample in pairs],
            "completion_ids": [sample.token_ids.tolist() for _, sample in pairs],
            "completion_steps": [[span.data.get("text", "") for span in sample.spans] for _, sample in pairs],
            "references": [list(prompt.references) for prompt, _ in pairs],
            "answer": [prompt.answer for prompt, _ in pairs],
        }
        return {name: values for name, values in arguments.items() if function.wants(name)}


async def _await(result: Any) -> Any:
    return await result


def _missing(function: RewardFunction, prompt: Prompt) -> str:
    lacking = [name for name in function.columns if name not in prompt.columns]
    if "answer" in function.required and prompt.answer is None:
        lacking.append("answer")
    if "references" in function.required and not prompt.references:
        lacking.append("references")
    return f"{function.name} needs {', '.join(lacking)}, which prompt {prompt.id} lacks" if lacking else ""


def _prompt(prompt: Prompt, chat: bool) -> Any:
    if chat:
        return [{"role": message.role, "content": message.content} for message in prompt.messages]
    return "\n\n".join(message.content for message in prompt.messages)


def _completion(sample: Sample, chat: bool) -> Any:
    return [{"role": "assistant", "content": sample.text}] if chat else sample.text


def _score(value: Any, function: str) -> Score:
    """Convert a returned value to a score; anything but a number is invalid, never zero."""
    if value is None:
        return Score.invalid(f"none: {function} returned None for this sample")
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
        value = value.item()
    if not isinstance(value, Real):
        return Score.invalid(f"wrong_type: {function} returned {_describe(value)} instead of a number")
    number = float(value)
    if not math.isfinite(number):
        return Score.invalid(f"not_finite: {function} returned {number}")
    return Score(number)


def _step_scores(value: Any, sample: Sample, function: str) -> Score:
    numbers = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return _score(value, function)
    if not isinstance(numbers, Sequence) or isinstance(numbers, str | bytes):
        return Score.invalid(f"wrong_type: {function} returned {_describe(value)} instead of a number for each step")
    if not numbers or len(numbers) != len(sample.spans):
        return Score.invalid(
            f"wrong_length: {function} returned {len(numbers)} numbers for a response of {len(sample.spans)} steps"
        )
    scores = [_score(number, function) for number in numbers]
    wrong = next((score for score in scores if not score.valid), None)
    rewards = zip(sample.spans, scores, strict=True)
    return wrong or Score(None, span_rewards=tuple(SpanReward(s.start, s.end, r.value or 0.0) for s, r in rewards))


def _describe(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"


class FunctionError(UserError, ValueError): ...


@dataclass(frozen=True)
class RewardFunction:
    call: Callable[..., Any]
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_all: bool

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.required if name not in ARGUMENTS)

    def wants(self, name: str) -> bool:
        return self.takes_all or name in self.required or name in self.optional


def load_function(path: str) -> RewardFunction:
    """Load `my_module.my_function` or `my_module.Class.method`; raise FunctionError."""
    try:
        function = find_object(path, inspect.isroutine)
    except NotFoundError as error:
        raise FunctionError(f"reward.function={path}: {error}") from error
    if inspect.isclass(function):
        raise FunctionError(f"reward.function={path}: is a class; name a Reward class with reward._target_={path}")
    if not callable(function):
        raise FunctionError(f"reward.function={path}: is a {type(function).__name__}, not a function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise FunctionError(f"reward.function={path}: its arguments cannot be read: {error}") from error
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    loaded = RewardFunction(
        call=function,
        name=path,
        required=tuple(p.name for p in by_name if p.default is p.empty),
        optional=tuple(p.name for p in by_name if p.default is not p.empty),
        takes_all=any(p.kind == p.VAR_KEYWORD for p in parameters),
    )
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_ONLY]
    if positional:
        raise FunctionError(f"reward.function={path}: takes {', '.join(positional)} by position only; drop the `/`")
    if not loaded.wants("completions"):
        raise FunctionError(
            f"reward.function={path}: has no argument `completions`: f(prompts, completions, **columns)"
        )
    return loaded
