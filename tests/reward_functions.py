"""Functions that `reward=function` is tried with, good ones and others."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

NOT_A_FUNCTION = 3


def words(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Number of words: TRL's signature."""
    assert len(prompts) == len(completions)
    assert all(len(values) == len(completions) for values in columns.values())
    return [float(len(completion.split())) for completion in completions]


async def words_later(completions: Sequence[str]) -> list[float]:
    """The same, awaited, and with one argument only."""
    await asyncio.sleep(0.01)
    return [float(len(completion.split())) for completion in completions]


def words_of_chat(prompts: Any, completions: Any) -> list[float]:
    """Completions and prompts as messages."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(len(completion[0]["content"].split())) for completion in completions]


def equals_solution(
    completions: Sequence[str], solution: Sequence[str], answer: Sequence[str | None] = ()
) -> np.ndarray:
    """A data column by name; another with a default; a numpy array as result."""
    assert len(answer) == len(completions)
    return np.array([text == wanted for text, wanted in zip(completions, solution, strict=True)])


def length_of_ids(completion_ids: Sequence[Sequence[int]], completions: Sequence[str], answer: Any) -> list[int]:
    """Token ids, and the gold answer."""
    return [len(ids) for ids in completion_ids]


def as_told(completions: Sequence[str]) -> Any:
    """Does what the first completion says."""
    order, good = completions[0], [float(len(text)) for text in completions]
    if order == "hang":
        time.sleep(1000)
    if order == "hang in C":
        ctypes.PyDLL(None).sleep(1000)
    if order == "die":
        os._exit(3)
    if order == "raise":
        raise RuntimeError("no judge today")
    if order == "raise TimeoutError":
        raise TimeoutError("the judge's own time-out")
    if order == "exit":
        raise SystemExit("bye")
    results: dict[str, Any] = {
        "None": None,
        "a string": "1.0",
        "a number": 1.0,
        "wrong length": good[:-1],
        "nan inside": [float("nan"), *good[1:]],
        "infinity inside": [float("inf"), *good[1:]],
        "None inside": [None, *good[1:]],
        "a string inside": ["1.0", *good[1:]],
        "a list inside": [[1.0], *good[1:]],
        "numpy numbers": [np.float32(number) for number in good],
    }
    return results.get(order, good)


def by_position(completions: Any, /) -> list[float]:
    """Cannot be called with names."""
    return [0.0 for _ in completions]


def no_completions(prompts: Any) -> list[float]:
    """Judges nothing."""
    return [0.0 for _ in prompts]


class Judge:
    """A class with a function inside."""

    @staticmethod
    def brevity(completions: Sequence[str]) -> list[float]:
        """Minus the number of words."""
        return [-float(len(text.split())) for text in completions]
