"""Other frameworks' names for rlkit's options, and what rlkit does not have: answers by name instead of by spelling.
The words are in vocabulary.yaml, which explains their format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLES = ("openrlhf", "trl", "trl_preferences", "verl")
"""The lists that the docs show as tables."""


@dataclass(frozen=True)
class Row:
    """Keys of another framework and their rlkit equivalents."""

    keys: Mapping[str, tuple[str, ...]]
    """Their key (`optim.lr`, or with a value: `loss_type=ipo`) -> rlkit's keys, options (`algorithm=gspo`) or words."""
    differs: str
    """Markdown; may be empty."""


@dataclass(frozen=True)
class Meaning:
    """What a typed key means in rlkit."""

    here: tuple[str, ...]
    differs: str
    """How it differs, as plain text."""
    framework: str
    by_value: bool
    """Whether the meaning holds only for this value."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the entries of `here` that are keys which a configuration may have or lack."""
        plain = (name for name in self.here if re.fullmatch(r"[\w.]+", name))
        return tuple(name for name in plain if "NAME" not in name and not name.endswith("_target_"))


@cache
def words() -> dict[str, Any]:
    """Return the content of vocabulary.yaml, read when first needed."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # 7 times as fast
    return content


@cache
def rows(name: str) -> tuple[Row, ...]:
    """Return the rows of one of TABLES, or of `others`."""
    return tuple(
        Row(
            {
                key: tuple(here.split(", "))
                for keys, here in row.items()
                if keys != "differs"
                for key in keys.split(", ")
            },
            row.get("differs", ""),
        )
        for row in words()[name]
    )


def meanings(key: str, value: object = None) -> list[Meaning]:
    """Return what other frameworks mean by this key, from the rows that fit it best: first those for its value, then
    those that share most of its sections."""
    found = [
        (fit, Meaning(here, _plain(row.differs), name, "=" in known))
        for name in (*TABLES, "others")
        for row in rows(name)
        for known, here in row.keys.items()
        if (fit := _fit(known, key.lower(), value))
    ]
    best = max((fit for fit, _ in found), default=None)
    unlike = {meaning.here: meaning for fit, meaning in reversed(found) if fit == best}
    return [meaning for _, meaning in found if unlike.get(meaning.here) is meaning]


def _fit(known: str, key: str, value: object) -> tuple[bool, int] | None:
    known, with_value, wanted = known.partition("=")
    if with_value and wanted != str(value).strip("[]'\"").lower():
        return None
    steps, typed = known.split("."), key.split(".")
    if typed[-len(steps) :] == steps:
        return bool(with_value), len(steps)
    # Only its last part, unless that is a common word (`enable`, `path`).
    return (bool(with_value), 1) if steps[-1] == typed[-1] and "_" in typed[-1] else None


def _plain(markdown: str) -> str:
    text = re.sub(r"\[[^]]*\]\(\.\./([\w/]+\.md)\)", r"docs/\1", markdown)
    return re.sub(r"[`*]", "", text)


def is_called(key: str, fields: Iterable[str]) -> bool:
    """Whether `key` is another framework's name for one of these full keys."""
    return not {name for meaning in meanings(key) for name in meaning.here}.isdisjoint(fields)


def answer(name: str, section: str = "") -> str | None:
    """Return the answer about a key, an option or part of one that rlkit does not have; None if nothing is known."""
    in_section = words()["in_section"]
    tops = [top for top in (section, name.partition(".")[0]) if top in in_section]
    own: list[Mapping[str, str]] = in_section[tops[0]] if tops else []
    steps = [step.strip("_") for step in name.lower().replace("-", "_").split(".")]
    for step in steps:
        told = _first(step, words()["wishes"]) or (_first(step, own) if step == steps[-1] else None)
        if told:
            return told
    return None


def about_command(name: str) -> str | None:
    word = name.lower().replace("-", "_")
    return _first(word, words()["commands"]) or answer(word)


def _first(word: str, patterns: Iterable[Mapping[str, str]]) -> str | None:
    pairs: Iterator[tuple[str, str]] = (pair for one in patterns for pair in one.items())
    found = ((re.fullmatch(pattern, word), text) for pattern, text in pairs)
    return next((match.expand(text) for match, text in found if match), None)
