"""The steps of a response: where they are in its text and tokens, and the reward of each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from rlkit.experience.types import BoolArray, Sample, Score, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StepStyle = Literal["auto", "lines", "numbered", "blank_line"]

_NUMBERED = re.compile(r"(\bstep\s+\d+\s*:)", re.IGNORECASE)
_STARTS = {
    "lines": re.compile(r"^([^\S\n]*\S)", re.MULTILINE),
    "numbered": _NUMBERED,
    "blank_line": re.compile(r"(?:\A|\n[^\S\n]*\n)(?:[^\S\n]*\n)*([^\S\n]*\S)"),
}


def split_steps(text: str, style: StepStyle = "auto") -> list[tuple[int, int]]:
    """Return the characters [start, end) of each step; together they cover the text.

    lines: lines that are not blank; blank_line: blocks separated by blank lines; numbered: every `Step <n>:`, and the
    text before the first; auto: numbered if there is such a mark, else lines.
    """
    if style == "auto":
        style = "numbered" if _NUMBERED.search(text) else "lines"
    starts = [match.start(1) for match in _STARTS[style].finditer(text)]
    if not starts or text[: starts[0]].strip():
        starts.insert(0, 0)
    starts[0] = 0
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def token_steps(
    text: str, offsets: Sequence[tuple[int, int]], steps: Sequence[tuple[int, int]], tokens: int
) -> list[tuple[int, int]]:
    """Return the response tokens [start, end) of each step that has any; together they cover all `tokens`.

    `offsets`: characters [start, end) of each token. A token belongs to the step that has its first visible character
    (or its first, if none is visible); tokens after the text belong to the last step.
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


def step_spans(token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, style: StepStyle) -> tuple[Span, ...]:
    """Return the steps of sampled tokens, which together cover them; `data["text"]` is their text.

    The tokenizer decodes token by token, so nothing is tokenised again and no character is split; it must be a fast
    one (`is_fast`).
    """
    pieces = token_pieces(token_ids, tokenizer)
    if not pieces:
        return ()
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces]).tolist()
    bounds = token_steps(text, list(pairwise([0, *ends])), split_steps(text, style), len(pieces))
    return tuple(Span(start, end, data={"text": "".join(pieces[start:end])}) for start, end in bounds)


def token_pieces(token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what each token adds to the text: nothing while a character is incomplete, and for special tokens.

    The tokenizer must be a fast one (`is_fast`).
    """
    from tokenizers.decoders import DecodeStream

    stream, backend = DecodeStream(skip_special_tokens=True), tokenizer.backend_tokenizer
    return [stream.step(backend, int(token)) or "" for token in token_ids]


def turn_ends(sample: Sample) -> BoolArray:
    """Return [T], True at the last trained token of each of the assistant's turns."""
    ends, trained = np.zeros(len(sample), dtype=np.bool_), sample.trained
    for span in sample.turns:
        if trained[span.start : span.end].any():
            ends[span.start + np.flatnonzero(trained[span.start : span.end])[-1]] = True
    return ends


def process_rewards(sample: Sample, score: Score) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return rewards [S] and response tokens [S, 2] (start, end) of a sample's steps, in order of their ends.

    Each span reward of the score is a step. Its token rewards are summed over the trained tokens of each of the
    sample's spans; without spans every trained token is a step. Equal spans are one step. An invalid score has no
    steps.
    """
    if not score.valid:
        return np.zeros(0), np.zeros((0, 2), dtype=np.int64)
    trained = sample.trained
    if not sample.spans and not score.span_rewards and score.token_rewards is not None:
        where = np.flatnonzero(trained)
        return score.token_rewards[where].astype(np.float64), np.stack([where, where + 1], axis=1)
    rewards: defaultdict[tuple[int, int], float] = defaultdict(float)
    for span in score.span_rewards:
        rewards[span.end, span.start] += span.value
    if score.token_rewards is not None:
        tokens = np.where(trained, score.token_rewards, 0.0).astype(np.float64)
        whole = [(span.start, span.end) for span in sample.spans if trained[span.start : span.end].any()]
        for start, end in whole or [(int(t), int(t) + 1) for t in np.flatnonzero(trained)]:
            rewards[end, start] += float(tokens[start:end].sum())
    ordered = sorted(rewards)
    spans = np.array([(start, end) for end, start in ordered], dtype=np.int64).reshape(-1, 2)
    return np.array([rewards[key] for key in ordered], dtype=np.float64), spans
