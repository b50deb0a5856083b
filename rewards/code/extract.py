"""The program in a response: its last fenced block of Python."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = {"python", "py", "python3"}


def last_python_block(text: str) -> str | None:
    r"""The content of the last block fenced as Python, else of the last without a language; None without either.

    A block that is never closed reaches to the end of the text.

    >>> last_python_block("First\n```python\nx = 1\n```\nbetter\n```python\nx = 2\n```")
    'x = 2\n'
    """
    found: dict[bool, str] = {}
    position = 0
    while opening := _FENCE.search(text, position):
        mark, language = opening[1], opening[2].lower()
        closing = re.compile(rf"^ {{0,3}}{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE).search(text, opening.end())
        content = text[opening.end() + 1 : closing.start() if closing else len(text)]
        if language in _PYTHON or not language:
            found[language in _PYTHON] = content
        if closing is None:
            break
        position = closing.end()
    return found.get(True, found.get(False))
