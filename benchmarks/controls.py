"""Parts that only benchmarks use: controls whose reward is unrelated to the answer, and a reward that costs nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rewards.base import Reward
from rewards.environment import EnvironmentReward
from rlkit.data.arithmetic import Arithmetic
from rlkit.data.base import BadRow, Problem, Split
from rlkit.experience import Group, GroupScores, Score


class ShuffledReferences(Arithmetic):
    """The embedded task, but every training problem has the references of another one."""

    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        """Shuffle references; held-out problems are unchanged, because only their gold answers are used."""
        problems, bad = super().load(split)
        if split == "train":
            others = list(problems)
            random.Random(self.seed).shuffle(others)
            problems = [
                replace(problem, references=other.references) for problem, other in zip(problems, others, strict=True)
            ]
        return problems, bad


class ShuffledRewards(EnvironmentReward):
    """The environment's rewards, shuffled randomly among the samples of each group."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        shuffled = []
        for group, scores in zip(groups, super().score(groups), strict=True):
            values = [score.value for score in scores.samples]
            random.Random(group.id).shuffle(values)
            pairs = zip(scores.samples, values, strict=True)
            # Turns' rewards belong to the tokens of their own sample, so they are dropped.
            shuffled.append(GroupScores(tuple(replace(score, value=v, span_rewards=()) for score, v in pairs)))
        return shuffled


def write_random_discriminator(trained: Path, folder: Path, seed: int) -> Path:
    """Write a discriminator with the trained one's shape and tokenizer and new random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(trained)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


class LetterReward(Reward):
    """Share of lower-case letters. It costs nothing, so that a benchmark times only the framework."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Score as the class says."""
        return [GroupScores(tuple(_letters(sample.text) for sample in group.samples)) for group in groups]


def _letters(text: str) -> Score:
    return Score(value=sum(map(str.islower, text)) / max(1, len(text)))
