"""`reward=exact_match`, `regex_match` and `format`."""

from __future__ import annotations

import re
import string
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rewards.base import RewardTraits
from rewards.services.answers import tagged_answer
from rewards.verifiers.answers import final_answer, gold_answer
from rewards.verifiers.pool import CannotJudgeError, TextRule, TextRuleConfig, excerpt
from rlkit.experience import Prompt, Score

AnswerIn = Literal["response", "final_answer", "answer_tag"]
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_GOLD = "{answer}"


class ExactMatch(TextRule):
    """1 if the answer equals a gold text, apart from white space."""

    class Config(TextRuleConfig):
        answer_in: AnswerIn = "final_answer"
        """Where the answer is. final_answer: marked by `####`, `answer is`, `A:` or a box; answer_tag: in the last
        <answer> tag; response: the whole response."""
        gold: Literal["answer", "references"] = "answer"
        """answer: compare with the gold answer; references: any of the prompt's reference texts may match."""
        ignore_case: bool = False
        """Ignore upper and lower case."""
        ignore_punctuation: bool = False
        """Ignore ASCII punctuation on both sides."""
        ignore_articles: bool = False
        """Ignore `a`, `an`, `the` in lower case (together with the two options above: SQuAD's comparison)."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(answer=config.gold == "answer", references=config.gold == "references", uses_gpu=False)

    @classmethod
    def vote(cls, config: Any, text: str) -> str | None:
        answer = find_answer(text, config.answer_in)
        return None if answer is None else _normal(answer, config)

    def task(self, prompt: Prompt) -> tuple[str, ...]:
        if self.config.gold == "references":
            golds = prompt.references
        else:
            golds = () if prompt.answer is None else (prompt.answer,)
        if self.config.answer_in == "final_answer":
            golds = tuple(gold_answer(gold) for gold in golds)
        if not any(gold.strip() for gold in golds):
            raise CannotJudgeError("no_gold: the prompt has no gold text to compare with")
        return golds

    @staticmethod
    def judge(config: Any, task: tuple[str, ...], text: str, /) -> Score:
        answer = find_answer(text, config.answer_in)
        if answer is None:
            return Score(0.0, components={"correct": 0.0, "format": 0.0}, trace=f"no {config.answer_in} found")
        correct = float(_normal(answer, config) in {_normal(gold, config) for gold in task})
        trace = f"answer {excerpt(answer)}, gold {' or '.join(excerpt(gold) for gold in task[:3])}"
        return Score(correct, components={"correct": correct, "format": 1.0}, trace=trace)


class RegexMatch(TextRule):
    """1 if a pattern of Python's `re` matches; one that runs past the deadline counts as no match."""

    class Config(TextRuleConfig):
        pattern: str | None = None
        """The pattern. `{answer}` in it is replaced by the gold answer, literally; flags go first: `(?is)`."""
        pattern_column: str | None = None
        """Column with a pattern for each prompt, instead of `pattern`."""
        answer_in: AnswerIn = "response"
        """Where to look: the whole response, its final answer (`####`, a box, ...) or its last <answer> tag."""
        whole: bool = False
        """The pattern must match all of that text."""

        @model_validator(mode="after")
        def _one_source(self) -> RegexMatch.Config:
            if (self.pattern is None) == (self.pattern_column is None):
                raise ValueError("set one of reward.pattern and reward.pattern_column")
            return self

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        columns = () if config.pattern_column is None else (config.pattern_column,)
        return RewardTraits(answer=_GOLD in (config.pattern or ""), columns=columns, uses_gpu=False)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        messages = super().check(config)
        if config.pattern is not None:
            try:
                re.compile(config.pattern.replace(_GOLD, "0"))
            except re.error as error:
                messages.append(f"reward.pattern={config.pattern!r} is not a regular expression: {error}")
        return messages

    def task(self, prompt: Prompt) -> str:
        pattern = self.config.pattern
        if pattern is None:
            pattern = prompt.columns.get(self.config.pattern_column)
            if not isinstance(pattern, str):
                raise CannotJudgeError(f"no_column: the prompt has no pattern in column {self.config.pattern_column!r}")
        if _GOLD in pattern:
            if prompt.answer is None:
                raise CannotJudgeError("no_gold: the pattern refers to the gold answer, but the prompt has none")
            pattern = pattern.replace(_GOLD, re.escape(gold_answer(prompt.answer)))
        try:
            re.compile(pattern)
        except re.error as error:
            raise CannotJudgeError(f"bad_pattern: {pattern[:100]!r} does not compile: {error}") from error
        return str(pattern)

    @staticmethod
    def judge(config: Any, task: str, text: str, /) -> Score:
        answer = find_answer(text, config.answer_in)
        if answer is None:
            return Score(0.0, components={"correct": 0.0, "format": 0.0}, trace=f"no {config.answer_in} found")
        compiled = re.compile(task)
        match = compiled.fullmatch(answer) if config.whole else compiled.search(answer)
        correct = float(match is not None)
        trace = f"matched {excerpt(match[0])}" if match is not None else f"no match in {excerpt(answer)}"
        return Score(correct, components={"correct": correct, "format": 1.0}, trace=trace)

    @classmethod
    def worst(cls, config: Any, task: Any) -> Score:
        """Return 0; an empty text is not judged, because a pattern may match it."""
        return Score(0.0, components={"correct": 0.0, "format": 0.0})


def find_answer(text: str, answer_in: AnswerIn) -> str | None:
    if answer_in == "response":
        return text.strip()
    if answer_in == "answer_tag":
        return tagged_answer(text)
    answer = final_answer(text)
    return None if answer is None else answer.text


def _normal(text: str, config: ExactMatch.Config) -> str:
    text = unicodedata.normalize("NFC", text)
    if config.ignore_case:
        text = text.casefold()
    if config.ignore_punctuation:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if config.ignore_articles:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


TagName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.:-]*$")]


class TagFormat(TextRule):
    """1 if every tag occurs exactly once, in order, with no text around them.

    The tokenizer's special tokens are not in the text; use other tags.
    """

    class Config(TextRuleConfig):
        tags: Annotated[tuple[TagName, ...], Field(min_length=1)] = ("think", "answer")
        """Names of the tags, in order."""
        grade: Literal["layout", "tag_count"] = "layout"
        """layout: 1 if the layout is right, else 0; tag_count: share of opening and closing tags that occur once."""
        text_outside: bool = False
        """Allow text before, between and after the tags."""
        empty_tags: bool = False
        """Allow tags that contain only white space."""
        opened_by_prompt: bool = False
        """The chat template wrote the first opening tag, so the response starts inside it."""

    def task(self, prompt: Prompt) -> None: ...

    @staticmethod
    def judge(config: Any, task: None, text: str, /) -> Score:
        full = f"<{config.tags[0]}>{text}" if config.opened_by_prompt else text
        marks = [mark for tag in dict.fromkeys(config.tags) for mark in (f"<{tag}>", f"</{tag}>")]
        counts = {mark: full.count(mark) for mark in marks}
        once = sum(count == 1 for count in counts.values()) / len(marks)
        fault = _fault(full, marks, counts, config)
        components = {"layout": float(not fault), "tag_count": once}
        return Score(components[config.grade], components=components, trace=fault or "the layout is as required")


def _fault(text: str, marks: list[str], counts: dict[str, int], config: Any) -> str:
    for mark, count in counts.items():
        if count != 1:
            return f"{mark} occurs {count} times"
    starts = [text.index(mark) for mark in marks]
    if starts != sorted(starts):
        return f"the tags are not in the order {', '.join(config.tags)}"
    outside = [text[: starts[0]], text[starts[-1] + len(marks[-1]) :]]
    outside += [text[starts[i] + len(marks[i]) : starts[i + 1]] for i in range(1, len(marks) - 1, 2)]
    stray = next((part for part in outside if part.strip()), None)
    if stray is not None and not config.text_outside:
        return f"text outside the tags: {excerpt(stray.strip())}"
    for i in range(0, len(marks), 2):
        if not config.empty_tags and not re.search(r"\S", text[starts[i] + len(marks[i]) : starts[i + 1]]):
            return f"nothing inside {marks[i]}"
    return ""
