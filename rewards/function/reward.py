"""`reward=function`: a plain Python function `f(prompts, completions, **columns) -> list[float | None]`.

The signature is that of TRL's reward functions, so these work here unchanged:

    def brevity(completions, **columns):
        return [-len(completion) / 100 for completion in completions]

    python -m rlkit.train reward=function reward.function=my_module.brevity
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rlkit.experience import Group, GroupScores, Prompt, Sample, Score

if TYPE_CHECKING:
    from rewards.function.load import RewardFunction


class FunctionReward(Reward):
    """Calls the function once for all samples of a call, every argument a list with one entry per sample.

    It is given those of these that its signature names, or all of them if it has `**columns`: `prompts`,
    `completions`, `completion_ids` (token ids), `references` (a list each), `answer`, and every data column. What it
    returns for a sample is a number, or None where it cannot judge; then the sample is invalid. If it raises, the call
    is tried once more in a new process, and then all its samples are invalid.
    """

    class Config(RewardConfig):
        """Options."""

        function: str
        """Dotted path of the function: my_module.my_function. `async def` functions are awaited."""
        chat: bool = False
        """Give prompts and completions as lists of messages ({"role": ..., "content": ...}) instead of texts."""

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._function: RewardFunction | None = None

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """The function can be imported and takes completions."""
        from rewards.function.load import FunctionError, load_function

        try:
            load_function(config.function)
        except FunctionError as error:
            return [str(error)]
        return []

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """What its arguments without a default name; nothing if it cannot be imported (`check` says so)."""
        from rewards.function.load import FunctionError, load_function

        try:
            function = load_function(config.function)
        except FunctionError:
            return RewardTraits()
        return RewardTraits(
            references="references" in function.required,
            answer="answer" in function.required,
            columns=function.columns,
        )

    def start(self) -> None:
        """Import the function. Raises FunctionError."""
        from rewards.function.load import load_function

        self._function = load_function(self.config.function)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """The function's values. Raises what the function raises."""
        if self._function is None:
            raise RuntimeError("start() was not called")
        pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
        asked = [_lacking(self._function, prompt) == "" for prompt, _ in pairs]
        judged = [pair for pair, usable in zip(pairs, asked, strict=True) if usable]
        scores = iter(self._judge(self._function, judged))
        all_scores = iter(
            next(scores) if usable else Score.invalid(f"no_column: {_lacking(self._function, prompt)}")
            for (prompt, _), usable in zip(pairs, asked, strict=True)
        )
        return [GroupScores(tuple(next(all_scores) for _ in group.samples)) for group in groups]

    def _judge(self, function: RewardFunction, pairs: Sequence[tuple[Prompt, Sample]]) -> list[Score]:
        """One score per pair, from one call of the function."""
        if not pairs:
            return []
        result = function.call(**self._arguments(function, pairs))
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        values = result.tolist() if hasattr(result, "tolist") else result  # numpy arrays and torch tensors
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            said = f"wrong_type: {function.name} returned {_described(values)}, not a list of {len(pairs)} numbers"
            return [Score.invalid(said)] * len(pairs)
        if len(values) != len(pairs):
            said = f"wrong_length: {function.name} returned {len(values)} values for {len(pairs)} completions"
            return [Score.invalid(said)] * len(pairs)
        return [_score(value, function.name) for value in values]

    def _arguments(self, function: RewardFunction, pairs: Sequence[tuple[Prompt, Sample]]) -> dict[str, list[Any]]:
        columns = dict.fromkeys(name for prompt, _ in pairs for name in prompt.columns)
        every: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt, _ in pairs] for name in columns}
        every |= {
            "prompts": [_prompt(prompt, self.config.chat) for prompt, _ in pairs],
            "completions": [_completion(sample, self.config.chat) for _, sample in pairs],
            "completion_ids": [sample.token_ids.tolist() for _, sample in pairs],
            "references": [list(prompt.references) for prompt, _ in pairs],
            "answer": [prompt.answer for prompt, _ in pairs],
        }
        return {name: values for name, values in every.items() if function.wants(name)}


async def _awaited(result: Any) -> Any:
    return await result


def _lacking(function: RewardFunction, prompt: Prompt) -> str:
    """What the function must have and this prompt has not, in words; empty if nothing."""
    lacking = [name for name in function.columns if name not in prompt.columns]
    if "answer" in function.required and prompt.answer is None:
        lacking.append("answer")
    if "references" in function.required and not prompt.references:
        lacking.append("references")
    return f"{function.name} wants {', '.join(lacking)}, which prompt {prompt.id} has not" if lacking else ""


def _prompt(prompt: Prompt, chat: bool) -> Any:
    """Messages, or their contents as one text."""
    if chat:
        return [{"role": message.role, "content": message.content} for message in prompt.messages]
    return "\n\n".join(message.content for message in prompt.messages)


def _completion(sample: Sample, chat: bool) -> Any:
    return [{"role": "assistant", "content": sample.text}] if chat else sample.text


def _score(value: Any, function: str) -> Score:
    """A number as a score; anything else is invalid and never zero."""
    if value is None:
        return Score.invalid(f"none: {function} returned None for this sample")
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        value = value.item()
    if not isinstance(value, Real):
        return Score.invalid(f"wrong_type: {function} returned {_described(value)} instead of a number")
    number = float(value)
    if not math.isfinite(number):
        return Score.invalid(f"not_finite: {function} returned {number}")
    return Score(number)


def _described(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"
