"""`$...$` in Markdown as MathML, which browsers draw by themselves: a Python-Markdown extension for the site."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from latex2mathml.converter import convert_to_element
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


class MathProcessor(InlineProcessor):
    def handleMatch(self, match: re.Match[str], data: str) -> tuple[ElementTree.Element, int, int]:  # type: ignore[override]
        display = "block" if match.group(1) == "$$" else "inline"
        return convert_to_element(match.group(2), display=display), match.start(0), match.end(0)


class MathExtension(Extension):
    def extendMarkdown(self, md: Any) -> None:
        # Before backslash escapes (180), and behind code (190).
        md.inlinePatterns.register(MathProcessor(r"(?<![\\$])(\$\$?)((?:[^$\\]|\\.)+?)\1(?!\$)", md), "math", 185)


def makeExtension(**options: Any) -> MathExtension:
    return MathExtension(**options)
