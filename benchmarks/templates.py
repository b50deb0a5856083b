"""Prints which chat templates can be appended to, as the table of docs/chat_templates.md.

    python benchmarks/templates.py                     # templates with the shapes of well-known models' templates
    python benchmarks/templates.py MODEL [MODEL ...]   # those of model folders

A row says, for a user's and a tool's answers, whether an episode can continue after its own tokens, whether it can
begin with a system message, and how tool calls are written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rlkit.data.rendering import ChatTemplate, load_tokenizer
from rlkit.rollout.calls import FromVLLM
from rlkit.rollout.engine import stop_token_ids
from rlkit.rollout.rendering import Renderer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/fixtures"))

from episode_templates import SHAPES, WEATHER, renderer_of

HEAD = (
    "| template | a user answers | a tool answers | system message | calls |",
    "|---|---|---|---|---|",
)
SHORT = {"drops the thinking": "drops earlier thinking", "does not end a turn": "ends turns with no stop token"}


def row(name: str, plain: Renderer, tools: Renderer) -> str:
    reader = tools.reader
    if isinstance(reader, FromVLLM):
        calls = reader.name
    else:
        calls = type(reader).__name__.lower() if reader is not None else "not known"
    cells = (
        _verdict(plain, "user"),
        _verdict(tools, "tool"),
        _verdict(plain, "system"),
        calls if "tool" not in tools.breaks else "",
    )
    with_tools = _verdict(tools, "user")
    first = cells[0] if cells[0] == with_tools else f"{cells[0]}; with tools: {with_tools}"
    return f"| {name} | {' | '.join((first, *cells[1:]))} |"


def _verdict(renderer: Renderer, role: str) -> str:
    why = renderer.breaks.get(role)
    if why is None:
        return "yes"
    if "refuses" in why or "leaves out" in why:
        return "has none"
    return next((short for text, short in SHORT.items() if text in why), "rewrites what was there")


def table() -> Iterator[str]:
    """Yield the rows of the shapes in tests/fixtures/episode_templates.py and of the package's policy."""
    yield from HEAD
    for name in [*SHAPES, "embedded"]:
        yield row(name, renderer_of(name), renderer_of(name, WEATHER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    models = parser.parse_args().models
    if not models:
        print(*table(), sep="\n")
        return
    print(*HEAD, sep="\n")
    for folder in models:
        tokenizer = load_tokenizer(folder)
        stops = stop_token_ids(str(folder), tokenizer)
        plain, tools = (Renderer(ChatTemplate(tokenizer), use, stops) for use in ((), (WEATHER,)))
        print(row(folder.name, plain, tools))
        for message in dict.fromkeys([*plain.problems(), *tools.problems(), *tools.cautions()]):
            print(f"  {folder.name}: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
