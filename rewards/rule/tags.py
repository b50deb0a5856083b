"""`reward=format`: the response is laid out in tags, `<think>...</think><answer>...</answer>` by default."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from rewards.rule.text_rule import TextRule, TextRuleConfig, excerpt
from rlkit.experience import Prompt, Score

TagName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.:-]*$")]


class TagFormat(TextRule):
    """1 if every tag stands exactly once, in order, and nothing stands around them.

    Needs nothing from the data. Tags that the tokenizer counts among its special tokens are not in the text that a
    reward sees; take others.
    """

    class Config(TextRuleConfig):
        """Options of the format reward."""

        tags: Annotated[tuple[TagName, ...], Field(min_length=1)] = ("think", "answer")
        """Names of the tags, in the order in which they must come."""
        grade: Literal["layout", "tag_count"] = "layout"
        """layout: 1 or 0; tag_count: the share of opening and closing tags that stand exactly once, 0 to 1."""
        text_outside: bool = False
        """Text before, between and after the tags is allowed."""
        empty_tags: bool = False
        """Tags with nothing but white space in them are allowed."""
        opened_by_prompt: bool = False
        """The chat template already wrote the first opening tag, so the response starts inside it."""

    def task(self, prompt: Prompt) -> None:
        """Nothing of the prompt matters."""

    @staticmethod
    def judge(config: Any, task: None, text: str, /) -> Score:
        """Components: `layout` (0 or 1) and `tag_count` (share of tags that stand exactly once)."""
        full = f"<{config.tags[0]}>{text}" if config.opened_by_prompt else text
        marks = [mark for tag in dict.fromkeys(config.tags) for mark in (f"<{tag}>", f"</{tag}>")]
        counts = {mark: full.count(mark) for mark in marks}
        once = sum(count == 1 for count in counts.values()) / len(marks)
        fault = _fault(full, marks, counts, config)
        components = {"layout": float(not fault), "tag_count": once}
        return Score(components[config.grade], components=components, trace=fault or "laid out as asked")


def _fault(text: str, marks: list[str], counts: dict[str, int], config: Any) -> str:
    """What is wrong with the layout; empty if nothing is."""
    for mark, count in counts.items():
        if count != 1:
            return f"{mark} stands {count} times"
    places = [text.index(mark) for mark in marks]
    if places != sorted(places):
        return f"the tags come in another order than {', '.join(config.tags)}"
    outside = [text[: places[0]], text[places[-1] + len(marks[-1]) :]]
    outside += [text[places[i] + len(marks[i]) : places[i + 1]] for i in range(1, len(marks) - 1, 2)]
    stray = next((part for part in outside if part.strip()), None)
    if stray is not None and not config.text_outside:
        return f"text outside the tags: {excerpt(stray.strip())}"
    for i in range(0, len(marks), 2):
        if not config.empty_tags and not re.search(r"\S", text[places[i] + len(marks[i]) : places[i + 1]]):
            return f"nothing inside {marks[i]}"
    return ""
