"""Controls for benchmarks/learning.py: rewards that carry no information about the answer must not teach it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from rlkit.data.arithmetic import Arithmetic
from rlkit.data.base import BadRow, Problem, Split


class ShuffledReferences(Arithmetic):
    """The embedded task, but every training problem carries the references of another one."""

    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        """Held-out problems stay as they are: they are judged by their gold answers only."""
        problems, bad = super().load(split)
        if split == "train":
            others = list(problems)
            random.Random(self.seed).shuffle(others)
            problems = [
                replace(problem, references=other.references) for problem, other in zip(problems, others, strict=True)
            ]
        return problems, bad


def write_random_discriminator(trained: Path, folder: Path, seed: int) -> Path:
    """A discriminator of the trained one's shape and tokenizer with freshly drawn weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(trained)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder
