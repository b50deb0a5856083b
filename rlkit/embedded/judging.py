"""Right and wrong, by the rule reward's own reading of a final answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.rule.math import compare_plain, final_answer
from rlkit.data.arithmetic import WordProblem


def is_right(answer: str, gold: int) -> bool:
    """Whether the text marks the gold number as its final answer."""
    found = final_answer(answer)
    return found is not None and compare_plain(found.text, str(gold)) is True


def correctness(problems: Sequence[WordProblem], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """[problems, answers] bool."""
    return np.array(
        [[is_right(text, problem.answer) for text in texts] for problem, texts in zip(problems, answers, strict=True)]
    )
