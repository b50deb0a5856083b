"""Parses command-line arguments into chosen options and values of keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from rlkit.config.messages import ConfigIssue, did_you_mean
from rlkit.config.vocabulary import answer, meanings
from rlkit.experience.names import nearest

Options = Mapping[str, Collection[str]]
"""Group -> names of its options."""


@dataclass
class Overrides:
    """The command line, split into chosen options and values of keys."""

    choices: dict[str, str | None] = field(default_factory=dict)
    """Group -> option. A misspelt option is replaced by the nearest one, so that the rest can still be checked."""
    parts: dict[str, str] = field(default_factory=dict)
    """For `reward=[a,b]`: name of the part -> option, or dotted path of a class."""
    values: dict[str, Any] = field(default_factory=dict)
    """Full key -> value."""
    typed: dict[str, str] = field(default_factory=dict)
    """Full key or group -> the argument as typed."""
    unusable: set[str] = field(default_factory=set)
    """Groups whose option is wrong and cannot be guessed."""
    guessed: set[str] = field(default_factory=set)
    """Groups whose option is a guess, so that checking how it fits with others is pointless."""
    unread: set[str] = field(default_factory=set)
    """Keys whose value cannot be parsed."""
    problems: list[ConfigIssue] = field(default_factory=list)


def parse_overrides(arguments: Sequence[str], options: Options) -> Overrides:
    """Sort `arguments` into options and values. Never raises: problems are collected in the result."""
    parser = OverridesParser.create()
    result = Overrides()
    for argument in arguments:
        message = _read(argument, parser, options, result)
        if message:
            result.problems.append(ConfigIssue(argument, message))
    return result


def _read(argument: str, parser: OverridesParser, options: Options, result: Overrides) -> str | None:
    if argument.startswith("-"):
        return _dashed(argument)
    key, equals, text = argument.partition("=")
    if not equals and (option := DASHED.get(f"--{argument.replace('_', '-')}")):
        return f"did you mean {option}?"
    if not equals and not argument.startswith("~"):
        pair = re.fullmatch(r"([\w.]+)\s*:\s*(\S.*)", argument)
        return f"this is not an assignment; write {'='.join(pair.groups()) if pair else f'{argument}=VALUE'}"
    try:
        override = _parsed(argument, parser)
    except HydraException as error:
        result.unread.add(key.strip("+ "))
        reason = str(error).splitlines()[0]
        if key != key.strip() or text != text.strip():
            return f"remove the spaces around `=` ({reason})"
        hint = f"quote special characters for the shell and for Hydra: \"{key}='{text}'\""
        return f"cannot be parsed ({reason}); {hint}"
    key = re.sub(r"^evaluation\.reward(?=\.|$)", "verifier", override.key_or_group)  # an alias of that part
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
    result.values.pop(key, None)  # the last one counts, also for the order
    result.values[key] = value
    result.typed[key] = argument
    return None


DASHED = {"--help": "--help", "--version": "--version", "--config": "--config FILE", "--dry-run": "dry_run=true"}


def _dashed(argument: str) -> str:
    bare = argument.lstrip("-")
    name = bare.partition("=")[0]
    option = nearest(f"--{name}", DASHED)
    if option is not None:
        return f"did you mean {DASHED[option]}?"
    if name in ("m", "multirun"):
        return "there are no sweeps: one command is one run; start one after another, each with its own run_dir"
    if name in ("cfg", "c", "info", "i", "package", "p", "config-name", "config-path", "config-dir", "cn", "cp", "cd"):
        return "is Hydra's, which is not used here; dry_run=true prints the plan, --config FILE starts from a file"
    if found := meanings(name.replace("-", "_")):
        ours = " or ".join(" and ".join(meaning.here) for meaning in found)
        return f"options have no dashes here; {name} is {ours}"
    return f"options have no dashes here; write {bare if '=' in bare else bare + '=VALUE'}"


def _parsed(argument: str, parser: OverridesParser) -> Override:
    """Parse as Hydra does; text that only Hydra's grammar refuses (`~/x`, `x=1`, accented letters) is literal."""
    try:
        return parser.parse_override(argument)
    except HydraException:
        key, _, text = argument.partition("=")
        literal = _literal(text, parser)
        if literal is None or re.fullmatch(r"\+{0,2}[\w.@/]+", key) is None:
            raise
        return parser.parse_override(f"{key}={literal}")


def _literal(text: str, parser: OverridesParser) -> str | None:
    """Return the text in quotes, or a list with quoted elements; None if it is ambiguous."""
    if text.startswith("[") and text.endswith("]"):
        elements = [
            element if _reads(element, parser) else _literal(element, parser) for element in text[1:-1].split(",")
        ]
        return None if None in elements else f"[{','.join(str(element) for element in elements)}]"
    plain = re.sub(r"\$\{[\w.:]+\}", "", text)
    return f"'{text}'" if text == text.strip() and not re.search(r"""[\[\](){},'"\\]""", plain) else None


def _reads(element: str, parser: OverridesParser) -> bool:
    try:
        parser.parse_override(f"x={element}")
    except HydraException:
        return False
    return True


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
    if value is None:
        result.unusable.add(group)
        return f"a run needs one; available: {', '.join(sorted(available))}"
    name = str(value)
    instead, guess = _no_option(group, name, available)
    if guess is None:
        result.unusable.add(group)
    else:
        result.choices[group] = guess
        result.guessed.add(group)
    return f"no such option; {instead}"


def _no_option(group: str, name: str, available: Collection[str]) -> tuple[str, str | None]:
    """Return the message, and the intended option if it is clear."""
    stem = re.split(r"[/\\]", name)[-1].rpartition(".")[0]
    if re.search(r"\.(ya?ml|py)$", name) and stem in available:
        return f"options have no suffix: {group}={stem}", stem
    if group == "data" and is_data_file(name):
        return read_by(name), None
    if name.endswith(".py") and group in ("reward", "verifier"):
        return f"name your own function with {group}=function {group}.function={stem}.NAME", None
    if "." in name and group in ("reward", "verifier") and not name.endswith(".py"):
        function = f", a function with {group}=function {group}.function={name}"
        return f"name your own class with {group}._target_={name}{function}", None
    if "." in name and group in ("algorithm", "data"):
        return f"name your own class with {group}._target_={name}", None
    wish = answer(name, group)
    if wish is not None:
        return f"{wish}; available: {', '.join(sorted(available))}", None
    guess = nearest(name, available)
    if guess is None and group == "model":
        return f"a model is a Hugging Face folder: model=hf model.path=FOLDER; {did_you_mean(name, available)}", None
    return did_you_mean(name, available), guess


def is_data_file(name: object) -> bool:
    return str(name).endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"))


def read_by(name: object) -> str:
    return f"to read a file, use data=jsonl data.path={name} (or csv, parquet)"


def quoted(value: str) -> str:
    if re.fullmatch(r"[\w./:@%+-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
COMBINED = "combined"
"""The reward option that holds parts."""


def part_names(value: Sequence[Any], options: Collection[str]) -> tuple[dict[str, str], str | None]:
    """Return part name -> option or class path, and what is wrong with the list.

    An element is an option, a dotted path, or `{name: option}`. A misspelt option is replaced by the nearest one.
    """
    parts: dict[str, str] = {}
    messages = []
    for element in value:
        named = isinstance(element, Mapping)
        if named and len(element) != 1:
            messages.append(f"{dict(element)} must be one name with its option, like {{small:polar}}")
            continue
        name, option = next(iter(element.items())) if named else (None, element)
        if not isinstance(option, str):
            messages.append(f"{option!r} is not an option; {did_you_mean(str(option), options)}")
            continue
        if "." not in option and option not in options:
            messages.append(f"there is no option {option}; {did_you_mean(option, options)}")
            option = nearest(option, options) or ""
        name = option.rpartition(".")[2] if name is None else str(name)
        if option and NAME.fullmatch(name) is None:
            messages.append(f"{name!r} cannot be a part's name: use only letters, digits and _, starting with a letter")
        elif name in parts:
            messages.append(f"{name} is listed twice; give each a name: reward='[{{a:{option}}},{{b:{option}}}]'")
        elif option:
            parts[name] = option
    if not value:
        messages.append(f"needs at least one part, like reward=[rule,polar]; available: {', '.join(sorted(options))}")
    return parts, "; ".join(messages) or None
