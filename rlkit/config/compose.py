"""Overrides, option files and a configuration file become one plain tree, each value with its source."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from rlkit.config.messages import ConfigIssue, did_you_mean, nearest
from rlkit.config.parts import conf_dir, import_part


def default_options(folder: Path) -> dict[str, str | None]:
    """Group -> its default option, from the defaults list of `config.yaml`."""
    entries = option_fields(folder, ".", "config").get("defaults", [])
    return {
        str(group).removeprefix("optional ").rpartition("@")[2]: option
        for entry in entries
        if isinstance(entry, Mapping)
        for group, option in entry.items()
    }


def borrowed_options(folder: Path) -> dict[str, str]:
    """Group without files -> the group whose options it takes: `reward@verifier: rule` in the defaults list."""
    entries = option_fields(folder, ".", "config").get("defaults", [])
    names = [str(group) for entry in entries if isinstance(entry, Mapping) for group in entry]
    return {borrower: source for source, _, borrower in (name.partition("@") for name in names) if borrower}


def group_options(folder: Path) -> dict[str, list[str]]:
    """Group -> its options, sorted, by file names alone. A folder with a `config.yaml` is another command's."""
    options = {
        group.name: sorted(file.stem for file in group.glob("*.yaml"))
        for group in folder.iterdir()
        if group.is_dir() and any(group.glob("*.yaml")) and not (group / "config.yaml").exists()
    }
    options |= {borrower: options[source] for borrower, source in borrowed_options(folder).items()}
    return dict(sorted(options.items()))


def compose_options(folder: Path, choices: Mapping[str, str | None]) -> DictConfig:
    """The tree of `config.yaml` with the chosen options; the `hydra` node is kept for interpolations.

    Raises HydraException if the files of conf/ themselves are wrong.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        names = {borrower: f"{source}@{borrower}" for borrower, source in borrowed_options(folder).items()}
        chosen = [
            f"{names.get(group, group)}={'null' if option is None else option}" for group, option in choices.items()
        ]
        tree = compose("config", overrides=chosen, return_hydra_config=True)
    OmegaConf.set_readonly(tree, False)
    OmegaConf.set_readonly(tree.hydra, False)
    OmegaConf.set_struct(tree, False)
    for borrower, name in names.items():
        tree.hydra.runtime.choices[borrower] = tree.hydra.runtime.choices.pop(name)
    return tree


def option_fields(folder: Path, group: str, option: str) -> dict[str, Any]:
    if not (folder / group).is_dir():
        group = borrowed_options(folder)[group]
    content = OmegaConf.to_container(OmegaConf.load(folder / group / f"{option}.yaml"))
    if not isinstance(content, dict):
        return {}
    own = content.get(group)  # a file for the whole tree (`@package _global_`) names the group
    return {str(key): value for key, value in (own if isinstance(own, dict) else content).items()}


def default_part(kind: str) -> dict[str, Any]:
    """The default option of a part, every field spelled out."""
    folder = conf_dir()
    fields = option_fields(folder, kind, default_options(folder)[kind] or "")
    cls = import_part(kind, fields.pop("_target_"))
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", **cls.Config(**fields).model_dump(mode="json")}


Options = Mapping[str, Collection[str]]
"""Group -> names of its options."""


@dataclass
class Overrides:
    """The command line, split into choices of options and values of keys."""

    choices: dict[str, str | None] = field(default_factory=dict)
    """Group -> option. A misspelt option is replaced by the nearest one, so that the rest can be checked, too."""
    parts: dict[str, str] = field(default_factory=dict)
    """Of `reward=[a,b]`: name of the part -> option, or dotted path of a class."""
    values: dict[str, Any] = field(default_factory=dict)
    """Full key -> value."""
    typed: dict[str, str] = field(default_factory=dict)
    """Full key or group -> the argument as typed."""
    unusable: set[str] = field(default_factory=set)
    """Groups whose option is wrong and not guessable."""
    problems: list[ConfigIssue] = field(default_factory=list)


def parse_overrides(arguments: Sequence[str], options: Options) -> Overrides:
    """Sort `arguments` into choices and values. Never raises: problems are collected in the result."""
    parser = OverridesParser.create()
    result = Overrides()
    for argument in arguments:
        message = _read(argument, parser, options, result)
        if message:
            result.problems.append(ConfigIssue(argument, message))
    return result


def _read(argument: str, parser: OverridesParser, options: Options, result: Overrides) -> str | None:
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
    if "." in name and group in ("algorithm", "reward", "data", "verifier"):
        return f"no such option; a class of your own is named by {group}._target_={name}"
    return f"no such option; {did_you_mean(name, available)}"


def quoted(value: str) -> str:
    if re.fullmatch(r"[\w./:@%+-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass
class Sources:
    typed: Mapping[str, str]
    """Full key or group -> the argument as typed."""
    options: dict[str, str] = field(default_factory=dict)
    """Swappable part -> its option or class."""
    file: Path | None = None
    in_file: set[str] = field(default_factory=set)
    """Full keys that the file sets."""

    def where(self, key: str, value: Any) -> str:
        """The argument that set `key`, or `key=value` and its file; `key` alone if nothing set it."""
        if key in self.options:
            chosen = self.typed.get(f"{key}._target_") or self.typed.get(key)
            return chosen or f"{key}={self.options[key]}"
        if key in self.typed:
            return self.typed[key]
        below = [argument for name, argument in self.typed.items() if name.startswith(f"{key}.")]
        whole = [self.typed[name] for name in _parents(key) if "={" in self.typed.get(name, "")]
        if isinstance(value, dict) and below:
            return below[-1]  # `seed.x=1` makes a section of what is a value
        if whole:
            return whole[0]  # `trainer={total_steps: 3}`
        text = key if value is None or isinstance(value, dict) else f"{key}={_spelled(value)}"
        return f"{self.file}: {text}" if any(name in self.in_file for name in (key, *_parents(key))) else text


def merge_file(composed: DictConfig, file: Path, choices: Mapping[str, Any], sources: Sources) -> list[ConfigIssue]:
    """Merge a configuration file into the composed values; return its problems. A part with a `_target_` is replaced
    whole."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        return [ConfigIssue(f"--config {file}", f"cannot be read: {' '.join(str(error).split())}")]
    if not isinstance(content, dict):
        return [ConfigIssue(f"--config {file}", "is not a configuration: it must be a mapping of sections")]
    content.pop("run_dir", None)  # that folder holds the run that wrote the file
    sources.file = file
    problems = []
    for section, value in content.items():
        if section in choices:
            message = f"{file} sets {section} already; leave one of them out"
            problems.append(ConfigIssue(sources.typed[section], message))
            continue
        listed = section == "reward" and isinstance(value, list)  # parts of a combination
        if isinstance(composed.get(section), DictConfig) and not (isinstance(value, dict | None) or listed):
            message = f"is a section of keys; an option is chosen on the command line, like {section}=OPTION"
            problems.append(ConfigIssue(f"{file}: {section}={_spelled(value)}", message))
            continue
        sources.in_file.add(str(section))
        if listed:
            composed[section] = value
        elif isinstance(value, dict) and "_target_" in value:
            composed[section] = value
            composed.hydra.runtime.choices[section] = str(value["_target_"]).rpartition(".")[2].lower()
        else:
            OmegaConf.update(composed, str(section), value, merge=True)
    return problems


def set_value(composed: DictConfig, key: str, value: Any) -> None:
    """Set one full key, creating sections on the way; validation reports later if the key does not exist."""
    OmegaConf.update(composed, key, value, merge=True, force_add=True)


def _parents(key: str) -> list[str]:
    steps = key.split(".")
    return [".".join(steps[:end]) for end in range(len(steps) - 1, 0, -1)]


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
COMBINED = "combined"
"""The reward option that holds parts."""


def part_names(value: Sequence[Any], options: Collection[str]) -> tuple[dict[str, str], str | None]:
    """Part name -> option or class path, and what is wrong with the list.

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
            messages.append(f"{option!r} is no option; {did_you_mean(str(option), options)}")
            continue
        if "." not in option and option not in options:
            messages.append(f"there is no option {option}; {did_you_mean(option, options)}")
            option = nearest(option, options) or ""
        name = option.rpartition(".")[2] if name is None else str(name)
        if option and NAME.fullmatch(name) is None:
            messages.append(f"{name!r} cannot name a part: letters, digits and _ only, a letter first")
        elif name in parts:
            messages.append(f"{name} stands there twice; give each a name: reward='[{{a:{option}}},{{b:{option}}}]'")
        elif option:
            parts[name] = option
    if not value:
        messages.append(f"needs at least one part, like reward=[rule,polar]; available: {', '.join(sorted(options))}")
    return parts, "; ".join(messages) or None


def add_parts(
    composed: DictConfig, folder: Path, options: Collection[str], chosen: Mapping[str, str], file: Path | None
) -> tuple[dict[str, str], list[ConfigIssue]]:
    """Put the parts of `reward=[a,b]`, or of a file's list, into `composed`.

    Return the reward's name for messages (empty if it is no list), and the file's problems.
    """
    problems = []
    section = composed.get("reward")
    if isinstance(section, ListConfig):  # only a file can do that
        listed = OmegaConf.to_container(section)
        assert isinstance(listed, list)
        chosen, message = part_names(listed, options)
        if message:
            problems.append(ConfigIssue(f"{file}: reward", message))
        composed["reward"] = option_fields(folder, "reward", COMBINED)
    if not chosen:
        return {}, problems
    for name, option in chosen.items():
        fields = {"_target_": option} if "." in option else option_fields(folder, "reward", option)
        OmegaConf.update(composed, f"reward.parts.{name}", fields, force_add=True)
    composed.hydra.runtime.choices["reward"] = "+".join(chosen)
    return {"reward": f"[{','.join(chosen)}]"}, problems


def unknown_parts(section: Mapping[str, Any]) -> dict[str, str]:
    """Notes on the keys of parts that do not exist (`reward.parts.polr.weight`)."""
    parts = section.get("parts")
    if not isinstance(parts, Mapping):
        return {}
    known = [str(name) for name, part in parts.items() if isinstance(part, Mapping) and "_target_" in part]
    return {
        f"reward.parts.{name}.{key}": f"there is no part {name}; {did_you_mean(str(name), known)}"
        for name, part in parts.items()
        if name not in known and isinstance(part, Mapping)
        for key in _leaves(part)
    }


def in_part(problem: ConfigIssue) -> ConfigIssue:
    part = re.match(r".*?(reward(?:\.parts\.\w+)+)", problem.where)
    if part is None or problem.message.startswith("no such key"):
        return problem
    return ConfigIssue(problem.where, re.sub(r"\breward\.(?!parts\b)(?=\w)", f"{part.group(1)}.", problem.message))


def _leaves(section: Mapping[str, Any]) -> list[str]:
    names = []
    for key, value in section.items():
        names += [f"{key}.{leaf}" for leaf in _leaves(value)] if isinstance(value, Mapping) and value else [str(key)]
    return names
