"""`python -m rlkit.config.reference FOLDER` writes what `--help` prints as Markdown, a page per section and option."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlkit.config.compose import (
    default_options,
    first_sentence,
    group_options,
    option_comment,
    option_text,
    option_values,
    values_of,
)
from rlkit.config.help import Block, default_text, matching, parts, sections, spelled
from rlkit.config.messages import allowed
from rlkit.config.parts import CONTRACTS, TARGET, conf_dir

GUIDES = {
    "algorithm": ("Equations, sources and how to read the metrics", "algorithms.md"),
    "reward": ("Rewards and how they combine", "rewards.md"),
    "environment": ("Environments", "environments.md"),
    "data": ("Forms of data", "data.md"),
    "model": ("Models", "models.md"),
    "cluster": ("Clusters", "cluster.md"),
}
"""Group -> title and path of its handwritten page in docs/."""


def pages() -> dict[str, str]:
    """Return path in docs/reference/ -> Markdown."""
    options, chosen = group_options(conf_dir()), default_options(conf_dir())
    blocks = [*sections(values_of(chosen, conf_dir())), *parts(options, chosen, ())]
    named = [block for block in blocks if "=" not in block.title]
    found: dict[str, str] = {}
    for block in named:  # several of one kind share a page
        text = _page(block.title, _fenced(block.text), block)
        found[_file(block.title)] = "\n".join(filter(None, [found.get(_file(block.title)), text]))
    groups = {group: names for group, names in options.items() if names != ["default"] and group != "verifier"}
    for group, names in groups.items():
        for name in names:
            found[f"{group}/{name}.md"] = _option_page(group, name, blocks)
    return {"index.md": _index(named, groups, chosen), **found}


def _index(named: Sequence[Block], groups: Mapping[str, Sequence[str]], chosen: Mapping[str, str | None]) -> str:
    lines = [
        "# Reference",
        "",
        "Made from the schema and `conf/`: what `python -m rlkit.train --help` prints.",
        "",
        "## Sections",
        "",
        "| | |",
        "|---|---|",
        *(f"| [{_cell(b.title)}]({_file(b.title)}) | {_cell(first_sentence(b.text))} |" for b in named),
    ]
    for group, names in groups.items():
        lines += ["", f"## `{group}=`", "", "| option | |", "|---|---|"]
        for name in names:
            mark = " (default)" if chosen.get(group) == name else ""
            lines.append(f"| [`{name}`]({group}/{name}.md){mark} | {_cell(_text(group, name))} |")
    return "\n".join(lines) + "\n"


def _text(group: str, name: str) -> str:
    return option_text(group, name) if group in CONTRACTS else option_comment(group, name)


def _option_page(group: str, name: str, blocks: Sequence[Block]) -> str:
    title = f"{group}={name}"
    block = next(iter(matching(title, blocks)), None)
    guide = ""
    if group in GUIDES:
        text, page = GUIDES[group]
        own = Path(f"rewards/{name}.md")
        page = str(own) if group == "reward" and (Path(__file__).parents[2] / "docs" / own).is_file() else page
        guide = f"{text}: [{page}](../../{page})."
    comment = option_comment(group, name) or _text(group, name)
    sets = {key: value for key, value in option_values(group, name).items() if not key.endswith(TARGET)}
    lines = [_fenced(comment), guide]
    if sets:
        lines += ["## What it sets", "", "\n".join(f"- `{key}={spelled(value)}`" for key, value in sets.items()), ""]
    return _page(title, "\n\n".join(line for line in lines if line), block)


def _page(title: str, text: str, block: Block | None) -> str:
    lines = [f"# {_code(title)}", "", text, ""]
    if block is not None and block.fields:
        lines += ["## Keys", ""]
        for key, info in block.fields:
            lines.append(f"`{key}`")
            default = default_text(info, block.sets.get(key))
            lines.append(f":   {_fenced(f'{allowed(info)}; {default}')}")
            if info.description:
                lines += ["", f"    {_fenced(info.description)}"]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _file(title: str) -> str:
    kind, _, name = title.lower().partition(" {kind:")
    return f"{kind.replace(' ', '_')}s.md" if name else f"{kind}.md"


def _code(title: str) -> str:
    return f"`{title}`" if "=" in title or title.islower() else title


def _cell(text: str) -> str:
    return _fenced(text).replace("|", "\\|")


def _fenced(text: str) -> str:
    """Escape plain text so that Markdown and HTML leave it unchanged."""
    return " ".join(_plain(text))


def _plain(text: str) -> Iterator[str]:
    for word in text.split():
        special = any(mark in word for mark in "<*_[$") and "`" not in word
        yield "".join(f"\\{c}" if c in "<*_[$" else c for c in word) if special else word


def main(arguments: Sequence[str] | None = None) -> int:
    (folder,) = sys.argv[1:] if arguments is None else arguments
    for name, text in pages().items():
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
