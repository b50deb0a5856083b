"""Tables of other frameworks' keys, written into the pages from rlkit/config/vocabulary.yaml, which also answers keys
that are typed.

python docs/making/tables.py    # tests/test_site.py compares
"""

from __future__ import annotations

import re
from pathlib import Path

from rlkit.config.vocabulary import rows

DOCS = Path(__file__).resolve().parents[1]
PAGES = {name: f"from/{name}.md" for name in ("openrlhf", "trl", "verl")} | {"trl_preferences": "algorithms.md"}
FRAMEWORKS = {"openrlhf": "OpenRLHF", "trl": "TRL", "trl_preferences": "TRL", "verl": "verl"}


def table(name: str) -> str:
    dashes = "--" if name == "openrlhf" else ""
    lines = [f"| {FRAMEWORKS[name]} | here | what differs |", "|---|---|---|"]
    for row in rows(name):
        there = ", ".join(f"`{dashes}{key}`" for key in row.keys)
        here = dict.fromkeys(name for names in row.keys.values() for name in names)
        lines.append(f"| {there} | {', '.join(map(_code, here))} | {row.differs}{' ' * bool(row.differs)}|")
    return "\n".join(lines)


def _code(name: str) -> str:
    """In backticks, unless it is words."""
    return f"`{name}`" if all("=" in word for word in name.split()) or " " not in name else name


def with_table(text: str, name: str) -> str:
    """The page with the table between its marks."""
    marks = rf"(<!-- keys of {name} -->\n).*?(\n<!-- end -->)"
    return re.sub(marks, lambda match: match.group(1) + table(name) + match.group(2), text, flags=re.DOTALL)


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / page).write_text(with_table((DOCS / page).read_text(), name))
