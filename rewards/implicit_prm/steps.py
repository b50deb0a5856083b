"""Scores of a response's steps from its token log-ratios q = log pi_phi - log pi_ref (arXiv 2412.01981); no torch.

A step's reward is the sum of `coefficient * q`. At inference the authors' coefficient is 0.001, not training's beta.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from algorithms.functional.advantages import Float64

StepStyle = Literal["auto", "lines", "numbered"]
StepKind = Literal["single", "cumulative"]
Aggregate = Literal["min", "sum", "mean", "last"]

_NUMBERED = re.compile(r"\bstep\s+\d+\s*:", re.IGNORECASE)
_LINE = re.compile(r"^[^\S\n]*\S", re.MULTILINE)


def split_steps(text: str, style: StepStyle = "auto") -> list[tuple[int, int]]:
    """Characters [start, end) of each step; together they cover the text.

    lines: lines that are not blank; numbered: every `Step <n>:`, and the text before; auto: numbered if there is
    such a mark.
    """
    if style == "auto":
        style = "numbered" if _NUMBERED.search(text) else "lines"
    pattern = _NUMBERED if style == "numbered" else _LINE
    starts = [match.start() for match in pattern.finditer(text)]
    if not starts or text[: starts[0]].strip():
        starts.insert(0, 0)
    starts[0] = 0
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def token_steps(
    text: str, offsets: Sequence[tuple[int, int]], steps: Sequence[tuple[int, int]], tokens: int
) -> list[tuple[int, int]]:
    """Response tokens [start, end) of each step that has any; together they cover all `tokens`.

    `offsets`: characters [start, end) of each token. A token belongs to the step with its first visible (else first)
    character; tokens after the text belong to the last step.
    """
    ends = np.array([end for _, end in steps])
    step_of = []
    for start, end in offsets:
        piece = text[start:end]
        first = start + len(piece) - len(piece.lstrip()) if piece.strip() else start
        step_of.append(min(int(np.searchsorted(ends, first, side="right")), len(steps) - 1))
    step_of += [len(steps) - 1] * (tokens - len(step_of))
    counts = np.bincount(np.maximum.accumulate(np.array(step_of, dtype=np.int64)), minlength=len(steps))
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return [(start, end) for start, end in pairwise(bounds) if end > start]


def step_scores(
    ratios: np.ndarray, spans: Sequence[tuple[int, int]], coefficient: float, kind: StepKind = "single"
) -> Float64:
    """[S] scores from log-ratios q [T] and the tokens [start, end) of each of S steps.

    single: d_k = coefficient * the sum of q in step k; cumulative: c_k = coefficient * the sum of q up to its end.
    """
    total = np.concatenate([[0.0], np.cumsum(ratios, dtype=np.float64)])
    ends = total[[end for _, end in spans]]
    if kind == "cumulative":
        return np.asarray(coefficient * ends)
    return np.asarray(coefficient * (ends - total[[start for start, _ in spans]]))


def aggregate(scores: Float64, how: Aggregate = "min") -> float:
    """One score from step scores [S]; `last` of cumulative ones equals `sum` of single ones."""
    match how:
        case "min":
            return float(scores.min())
        case "sum":
            return float(scores.sum())
        case "mean":
            return float(scores.mean())
        case "last":
            return float(scores[-1])
