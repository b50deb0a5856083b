"""Command-line overrides in Hydra's grammar, parsed one by one so that each mistake is reported as its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException

from rlkit.config.combined import COMBINED, part_names
from rlkit.config.names import did_you_mean, nearest
from rlkit.config.problems import Problem

Options = Mapping[str, Collection[str]]
"""Group name -> names of its options."""


@dataclass
class Overrides:
    """What the command line says, split into choices of options and values of keys."""

    choices: dict[str, str | None] = field(default_factory=dict)
    """Group -> option. A misspelt option is replaced by the nearest one, so that the rest can be checked too."""
    parts: dict[str, str] = field(default_factory=dict)
    """Of `reward=[a,b]`: name of the part -> option, or dotted path of a class."""
    values: dict[str, Any] = field(default_factory=dict)
    """Full key -> value."""
    typed: dict[str, str] = field(default_factory=dict)
    """Full key or group -> the argument as it was typed."""
    unusable: set[str] = field(default_factory=set)
    """Groups whose option is wrong and not guessable: nothing else can be said about them."""
    problems: list[Problem] = field(default_factory=list)


def parse_overrides(arguments: Sequence[str], options: Options) -> Overrides:
    """Sort `arguments` into choices and values. Never raises: problems are collected in the result."""
    parser = OverridesParser.create()
    result = Overrides()
    for argument in arguments:
        message = _read(argument, parser, options, result)
        if message:
            result.problems.append(Problem(argument, message))
    return result


def _read(argument: str, parser: OverridesParser, options: Options, result: Overrides) -> str | None:
    """Add one argument to `result`; returns what is wrong with it, if anything is."""
    if argument.startswith("-"):
        bare = argument.lstrip("-")
        return f"options have no dashes here; write {bare if '=' in bare else bare + '=VALUE'}"
    if "=" not in argument and not argument.startswith("~"):
        return f"this is no assignment; write {argument}=VALUE"
    try:
        override = parser.parse_override(argument)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        key, _, text = argument.partition("=")
        if key != key.strip() or text != text.strip():
            return f"remove the spaces around `=` ({reason})"
        hint = f"quote special characters for the shell and for Hydra: \"{key}='{text}'\""
        return f"cannot be parsed ({reason}); {hint}"
    key = override.key_or_group
    if override.type == OverrideType.DEL:
        return "keys cannot be removed; every key has a default, so leave it out or set it to another value"
    if override.package is not None:
        return f"packages (`@{override.package}`) are not used here; write {key}=OPTION"
    if key == "hydra" or key.startswith("hydra."):
        return "Hydra only composes the configuration here; its own settings have no effect"
    if override.is_sweep_override():
        return "one run takes one value, not a sweep; write a list as key=[a,b] and text with a comma as key='\"a,b\"'"
    value: Any = override.value()
    if key in options and not isinstance(value, dict):
        return _choose(argument, key, value, options, result)
    result.values.pop(key, None)  # the last one counts, also in order
    result.values[key] = value
    result.typed[key] = argument
    return None


def _choose(argument: str, group: str, value: Any, options: Options, result: Overrides) -> str | None:
    available = options[group]
    result.typed[group] = argument
    if group == "reward":
        result.parts = {}  # the last one counts
        if isinstance(value, list) and COMBINED in available:
            result.choices[group] = COMBINED
            result.parts, message = part_names(value, available)
            return message
    if value in available or (group == "experiment" and value is None):
        result.choices[group] = value
        return None
    name = str(value)
    guess = None if value is None else nearest(name, available)  # null is no misspelt name
    if guess is None:
        result.unusable.add(group)
    else:
        result.choices[group] = guess
    if "." in name and group in ("algorithm", "reward", "data"):
        return f"no such option; a class of your own is named by {group}._target_={name}"
    return f"no such option; {did_you_mean(name, available)}"


def quoted(value: str) -> str:
    """A text as Hydra's grammar takes it."""
    if re.fullmatch(r"[\w./:@%+-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
