"""Groups and misbehaving rewards for the tests of rewards and of the process that hosts them."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.base import Reward, RewardConfig
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score


def make_sample(index: int, text: str) -> Sample:
    """A sample with one token per word."""
    length = max(1, len(text.split()))
    return Sample(
        index=index,
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -0.1, dtype=np.float32),
        text=text,
        finish_reason="stop",
        policy_versions=(0, 0),
        seed=index,
    )


def make_group(
    name: str,
    texts: Sequence[str],
    answer: str | None = "42",
    references: Sequence[str] = ("6 * 7 = 42\n#### 42",),
    question: str = "What is 6 times 7?",
) -> Group:
    """A group of samples with these texts."""
    prompt = Prompt(f"p-{name}", (Message("user", question),), (1, 2, 3), tuple(references), answer)
    return Group(name, prompt, tuple(make_sample(index, text) for index, text in enumerate(texts)))


class Misbehaving(Reward):
    """Does what the text of the first sample says; otherwise scores the number of words."""

    class Config(RewardConfig):
        """Options."""

        once_file: str = ""
        """If set, misbehave only as long as this file does not exist, and create it."""
        fail_start: bool = False
        """Raise in start()."""

    def start(self) -> None:
        if self.config.fail_start:
            raise ValueError("the model folder is empty")

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        good = [GroupScores(tuple(Score(float(len(s.text.split()))) for s in group.samples)) for group in groups]
        order = groups[0].samples[0].text
        if self.config.once_file:
            if os.path.exists(self.config.once_file):  # noqa: PTH110
                return good
            open(self.config.once_file, "w").close()  # noqa: PTH123
        return self._misbehave(order, good)

    def _misbehave(self, order: str, good: list[GroupScores]) -> Any:
        if order == "hang":
            time.sleep(1000)
        if order == "hang in C":
            ctypes.PyDLL(None).sleep(1000)  # holds the GIL: no Python thread of this process runs any more
        if order == "raise":
            raise RuntimeError("the judge is offline")
        if order == "die":
            os._exit(7)
        if order == "nan in Score":
            return [GroupScores(tuple(Score(float("nan")) for _ in scores.samples)) for scores in good]
        wrong: dict[str, Any] = {
            "None": None,
            "string": "1.0",
            "wrong length": good[:-1],
            "strings inside": ["1.0"] * len(good),
            "sample missing": [GroupScores(scores.samples[:-1]) for scores in good],
            "nan": [GroupScores((float("nan"), *scores.samples[1:])) for scores in good],  # type: ignore[arg-type]
            "None inside": [GroupScores((None, *scores.samples[1:])) for scores in good],  # type: ignore[arg-type]
            "bare number": [GroupScores((1.0, *scores.samples[1:])) for scores in good],  # type: ignore[arg-type]
            "too many tokens": [
                GroupScores(tuple(Score(1.0, token_rewards=np.zeros(99, np.float32)) for _ in scores.samples))
                for scores in good
            ],
        }
        return wrong.get(order, good)
