"""The tables of docs/metrics.md, made of rlkit/config/metrics.yaml: each stands below a comment that names its section.

python docs/making/metric_tables.py docs/metrics.md    # `make docs` does it
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rlkit.config.metric_table import MetricRow, sections

HEAD = "| metric | what it means | how to read it | what to do about it |\n|---|---|---|---|\n"
TABLE = re.compile(r"(<!-- metrics: (\w+) -->\n\n)(?:\|.*\n)*")


def with_tables(page: str) -> str:
    """Raises KeyError for a section that metrics.yaml lacks, ValueError if the page lacks one."""
    named = [name for _, name in TABLE.findall(page)]
    if missing := [name for name in sections() if named.count(name) != 1]:
        raise ValueError(f"the page must name each section of metrics.yaml once, <!-- metrics: NAME -->: {missing}")
    return TABLE.sub(lambda match: match[1] + HEAD + "".join(map(_row, sections()[match[2]])), page)


def _row(row: MetricRow) -> str:
    cells = (", ".join(f"`{name}`" for name in row.names), row.meaning, row.reading, row.remedy)
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n"


def main(arguments: list[str]) -> None:
    for name in arguments:
        page = Path(name)
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
