"""`reward=multiple_choice`: 1 if the response chooses the right option, else 0."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import RewardTraits
from rewards.verifiers.pool import CannotJudgeError, TextRule, TextRuleConfig, column_value, excerpt
from rlkit.experience import Prompt, Score

_MARKERS = re.compile(
    r"####|<answer>|\\f?boxed\s*\{|\banswer[*_\s]*(?:is|was|:|=)|\b(?:option|choice)[*_\s]*(?:is|:)", re.IGNORECASE
)
_LATEX = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}\n]*)\}|[\\$*_`\"'{}<>]|^[\s:=]+")
_LABEL = re.compile(
    r"(?:(?:option|choice|answer|letter)\s*:?\s*)?[(\[]?([A-Za-z0-9])\b(?P<end>[)\].:,;]*)(?P<rest>.*)", re.IGNORECASE
)
_SECOND = re.compile(
    r"\s*(?:or|and|and/or|/|,|;|&|(?=[(\[]))\s*(?:option|choice)?\s*[(\[]?([A-Za-z0-9])\b[)\].:,;]*(?!['\w])",
    re.IGNORECASE,
)
_LINE_START = re.compile(
    r"^\s*(?:[-*>]\s+)?(?:[*_`]*[(\[]([A-Za-z])[)\]][*_`]*|[*_`]*([A-Z])[*_`]*[).:](?=\s|$|[*_`]))(.*)$"
)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_AT_THE_END = re.compile(r"\b([A-Z0-9])\b[^\w\n]*$")
_ALONE = re.compile(r"(?<![\w'’])[B-HJ-Z0-9](?![\w'’])")
_NOT = re.compile(r"\b(?:not|never|neither|nor)\b|n['’]t\b", re.IGNORECASE)
_AFTER_LETTER = re.compile(r"\s*(?:$|[(\[\-–—]|because|since|as\b|is\b|for\b|due\b|which|given|\.)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choices:
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    gold: str


class MultipleChoice(TextRule):
    """Finds the chosen letter, or an option's text, in the part that the response marks as its answer.

    `(B)`, `Answer: B`, `B) 12 cm`, `\\boxed{\\text{B}}` and `**B**` count. Two options or none score 0.
    """

    class Config(TextRuleConfig):
        options_column: str | None = None
        """Column with the options (a list of texts, or `{label: [...], text: [...]}`); null: letters only, A to J."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        columns = () if config.options_column is None else (config.options_column,)
        return RewardTraits(answer=True, columns=columns, uses_gpu=False)

    @classmethod
    def vote(cls, config: Any, text: str) -> str | None:
        return chosen_option(text, tuple(string.ascii_uppercase[:10]))

    def task(self, prompt: Prompt) -> Choices:
        """Return the options; the gold answer is a label, an option's text, or its index from 0."""
        if prompt.answer is None:
            raise CannotJudgeError("no_gold: the prompt has no gold answer")
        labels: tuple[str, ...] = tuple(string.ascii_uppercase[:10])
        texts: tuple[str, ...] = ()
        if self.config.options_column is not None:
            labels, texts = _options(column_value(prompt, self.config.options_column), self.config.options_column)
        gold = _gold(prompt.answer, labels, texts)
        if gold is None:
            raise CannotJudgeError(f"bad_gold: the gold answer {excerpt(prompt.answer)} is none of {', '.join(labels)}")
        return Choices(labels, texts, gold)

    @staticmethod
    def judge(config: Any, task: Choices, text: str, /) -> Score:
        chosen = chosen_option(text, task.labels, task.texts)
        correct = float(chosen == task.gold)
        trace = f"chose {chosen}, gold {task.gold}" if chosen else f"no single option chosen, gold {task.gold}"
        return Score(correct, components={"correct": correct, "format": float(chosen is not None)}, trace=trace)


def chosen_option(text: str, labels: Sequence[str], texts: Sequence[str] = ()) -> str | None:
    """Return the chosen label; None for none or several.

    The text after the last marker (`answer is`, `####`, `\\boxed{`) decides. Without a marker it is the response if it
    has one line, else its last line that starts with a label (and does not end a list of them), else the only `(X)` or
    the last word of the last line.
    """
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None
    marks = list(_MARKERS.finditer(text))
    for mark in reversed(marks[-8:]):  # if nothing readable follows a marker, the previous one decides
        end = text[mark.end() :].lstrip(" \t:*_\n").split("\n", 1)[0]
        chosen = _read(end, labels, texts)
        if chosen is not None:
            return chosen or None
    if marks:
        return None
    if len(lines) == 1:
        chosen = _read(lines[0], labels, texts)
        if chosen is not None:
            return chosen or None
    starts = [_line_label(line, labels) for line in lines]
    for index in reversed(range(len(lines))):
        start = starts[index]
        if start is not None:
            in_a_list = index > 0 and starts[index - 1] not in (None, start)
            return None if in_a_list or start == "" else start
    named = {label for letter in _IN_BRACKETS.findall(lines[-1]) if (label := _as_label(letter, labels))}
    if not named and not _NOT.search(lines[-1]):
        named = {label for letter in _AT_THE_END.findall(lines[-1]) if (label := _as_label(letter, labels))}
        named = named if len(_ALONE.findall(lines[-1])) == 1 else set()
    if len(named) == 1:
        return named.pop()
    return (_only_text(lines[-1], labels, texts) or None) if not named else None


def _line_label(line: str, labels: Sequence[str]) -> str | None:
    """Return the label at the start of the line; empty if the line names another one, too."""
    match = _LINE_START.match(line[:2000])
    label = _as_label(match[1] or match[2], labels) if match is not None else None
    if match is None or label is None:
        return None
    return "" if _names_another(match[3], label, labels) else label


def _read(line: str, labels: Sequence[str], texts: Sequence[str]) -> str | None:
    """Return the label that the line chooses; empty if it chooses two."""
    line = _LATEX.sub(lambda match: match[1] or "", line[:2000]).strip()
    for label, option in zip(labels, texts, strict=False):
        if _plain(line) == _plain(option):
            return label
    match = _LABEL.match(line)
    if match is not None and (named := _as_label(match[1], labels)):
        # `A dog` is not the letter A: after a bare letter must come an end, a bracket or a reason.
        bare = not match["end"] and not line.startswith(("(", "["))
        in_words = bare and match[1] in ("A", "a", "I", "i") and not _AFTER_LETTER.match(match["rest"])
        lower_case = bare and match[1].islower() and match["rest"].strip(" .") != ""
        two = _names_another(("," if set(match["end"]) & {",", ";"} else "") + match["rest"], named, labels)
        if two:
            return ""
        if not in_words and not lower_case:
            return named
    return _only_text(line, labels, texts)


def _names_another(rest: str, label: str, labels: Sequence[str]) -> bool:
    second = _SECOND.match(rest)
    if second is None:
        return False
    another = _as_label(second[1], labels)
    is_word = second[1] in ("a", "i", "A", "I") and rest[second.end() :].strip() != ""
    return another not in (None, label) and not is_word and (second[1].isupper() or second[1].isdigit() or "or" in rest)


def _only_text(line: str, labels: Sequence[str], texts: Sequence[str]) -> str | None:
    """Return the label of the option whose text is in the line as whole words; empty for several."""
    words = f" {_plain(line)} "
    named = [(label, _plain(option)) for label, option in zip(labels, texts, strict=False)]
    inside = [(label, option) for label, option in named if option and f" {option} " in words]
    # `New York City` also contains `New York`: of nested options, the longest counts.
    longest = [
        label for label, option in inside if not any(option != o and f" {option} " in f" {o} " for _, o in inside)
    ]
    if not longest:
        return None
    return longest[0] if len(longest) == 1 else ""


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w.%/+-]+", " ", text.casefold()).replace(". ", " ").strip(" .").split())


def _as_label(letter: str, labels: Sequence[str]) -> str | None:
    return next((label for label in labels if label.upper() == letter.upper()), None)


def _options(value: Any, column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if isinstance(value, Mapping) and {"label", "text"} <= set(value):
        labels, texts = list(value["label"]), list(value["text"])
    elif isinstance(value, Mapping):
        labels, texts = list(value.keys()), list(value.values())
    elif isinstance(value, (list, tuple)):
        labels, texts = list(string.ascii_uppercase[: len(value)]), list(value)
    else:
        labels, texts = [], []
    if not 2 <= len(texts) == len(labels) or not all(isinstance(label, str) and len(label) == 1 for label in labels):
        raise CannotJudgeError(
            f"bad_column: column {column!r} does not hold a list of 2 to 26 options with one-letter labels"
        )
    return tuple(labels), tuple(str(text) for text in texts)


def _gold(answer: str, labels: Sequence[str], texts: Sequence[str]) -> str | None:
    answer = answer.rpartition("####")[2].strip()
    bare = answer.strip("()[]. ")
    label = _as_label(bare, labels) if len(bare) == 1 else None
    if label is not None:
        return label
    same = [label for label, text in zip(labels, texts, strict=False) if _plain(text) == _plain(answer)]
    if len(same) == 1:
        return same[0]
    if texts and answer.isascii() and answer.isdigit() and int(answer) < len(labels):
        return labels[int(answer)]
    return chosen_option(answer, labels, texts)
