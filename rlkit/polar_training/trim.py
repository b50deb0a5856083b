"""Sampled responses made self-contained: loops are cut short but stay loops, unfinished endings go (App. D.1.1)."""

from __future__ import annotations

import re

LOOP = re.compile(r"(.{2,200}?)\1{3,}", re.DOTALL)
"""A span that stands four times or more in a row."""
SHORTEST_LOOP = 64
"""Characters; shorter repetition is punctuation, a table's rule, a row of zeros."""
KEPT = 3
"""Repetitions that stay: the sample still shows that its policy loops."""
ENDING = re.compile(r"[.!?。！？…][\"'”’)\]]*(?=\s)|[。！？]|\n")
"""After which a text can end."""


def trim(text: str, finished: bool) -> str:
    """The response as a policy's sample; `finished`: it ended by itself, not at the length limit."""
    text = without_loops(text)
    return text if finished else without_unfinished_end(text)


def without_loops(text: str) -> str:
    """Repeated spans cut to KEPT repetitions."""
    return LOOP.sub(lambda loop: loop[1] * KEPT if len(loop[0]) >= SHORTEST_LOOP else loop[0], text)


def without_unfinished_end(text: str) -> str:
    """Up to the last end of a sentence or line; a text without any stays as it is."""
    ends = [match.end() for match in ENDING.finditer(text)]
    return text[: ends[-1]].rstrip("\n") if ends else text
