"""What of the site is not written by hand: the reference, tables of metrics, and llms.txt for readers that are models.

python docs/making/pages.py    # `make docs` does it
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import metric_tables
import yaml

from rlkit.config import reference

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def nav_pages(entries: list[Any]) -> Iterator[Path]:
    """All pages of the navigation, in its order."""
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(target, list):
                yield from nav_pages(target)
            else:
                yield DOCS / target


def summary(page: Path) -> str:
    """Title and first paragraph, as an entry of llms.txt (llmstxt.org)."""
    title, *rest = page.read_text(encoding="utf-8").split("\n\n")
    text = next((" ".join(part.split()) for part in rest if part[0] not in "#|`!<"), "")
    return f"- [{title.lstrip('# ').strip()}]({page.relative_to(DOCS)}): {text}"


def main() -> None:
    shutil.rmtree(DOCS / "reference", ignore_errors=True)
    reference.main([str(DOCS / "reference")])
    metric_tables.main([str(DOCS / "metrics.md")])
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = list(nav_pages(config["nav"]))
    head = f"# {config['site_name']}\n\n> {config['site_description']}\n\n## Pages\n\n"
    (DOCS / "llms.txt").write_text(head + "\n".join(map(summary, pages)) + "\n", encoding="utf-8")
    texts = (f"<!-- {page.relative_to(DOCS)} -->\n\n{page.read_text(encoding='utf-8')}" for page in pages)
    (DOCS / "llms-full.txt").write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
