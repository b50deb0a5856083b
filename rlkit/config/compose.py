"""Merges overrides, option files and a configuration file into one plain tree that knows the source of each value."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from rlkit.config.messages import ConfigIssue, did_you_mean
from rlkit.config.overrides import COMBINED, part_names
from rlkit.config.parts import conf_dir, import_part


def default_options(folder: Path) -> dict[str, str | None]:
    """Return group -> its default option, from the defaults list of `config.yaml`."""
    entries = option_fields(folder, ".", "config").get("defaults", [])
    return {
        str(group).removeprefix("optional ").rpartition("@")[2]: option
        for entry in entries
        if isinstance(entry, Mapping)
        for group, option in entry.items()
    }


def borrowed_options(folder: Path) -> dict[str, str]:
    """Return group without files -> the group whose options it takes: `reward@verifier: rule` in the defaults list."""
    entries = option_fields(folder, ".", "config").get("defaults", [])
    names = [str(group) for entry in entries if isinstance(entry, Mapping) for group in entry]
    return {borrower: source for source, _, borrower in (name.partition("@") for name in names) if borrower}


def group_options(folder: Path) -> dict[str, list[str]]:
    """Return group -> its options, sorted, from file names. A folder with a `config.yaml` is another command's."""
    options = {
        group.name: sorted(file.stem for file in group.glob("*.yaml"))
        for group in folder.iterdir()
        if group.is_dir() and any(group.glob("*.yaml")) and not (group / "config.yaml").exists()
    }
    options |= {borrower: options[source] for borrower, source in borrowed_options(folder).items()}
    return dict(sorted(options.items()))


def compose_options(folder: Path, choices: Mapping[str, str | None]) -> DictConfig:
    """Return the tree of `config.yaml` with the chosen options. The `hydra` node is kept for interpolations.

    Raises HydraException if the files of conf/ themselves are wrong.
    """
    return deepcopy(_composed(folder, tuple(sorted(choices.items()))))


@cache
def _composed(folder: Path, choices: tuple[tuple[str, str | None], ...]) -> DictConfig:
    """Compose and cache the tree: composing takes most of the loading time. Callers must not change the result."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        names = {borrower: f"{source}@{borrower}" for borrower, source in borrowed_options(folder).items()}
        chosen = [f"{names.get(group, group)}={'null' if option is None else option}" for group, option in choices]
        tree = compose("config", overrides=chosen, return_hydra_config=True)
    OmegaConf.set_readonly(tree, False)
    OmegaConf.set_readonly(tree.hydra, False)
    OmegaConf.set_struct(tree, False)
    for borrower, name in names.items():
        tree.hydra.runtime.choices[borrower] = tree.hydra.runtime.choices.pop(name)
    return tree


@cache
def _content(file: Path) -> Any:
    """Return the content of an option file, read once. Callers must not change it."""
    return OmegaConf.to_container(OmegaConf.load(file))


def option_fields(folder: Path, group: str, option: str) -> dict[str, Any]:
    if not (folder / group).is_dir():
        group = borrowed_options(folder)[group]
    content = _content(folder / group / f"{option}.yaml")
    if not isinstance(content, dict):
        return {}
    own = content.get(group)  # a file for the whole tree (`@package _global_`) names the group
    fields = own if isinstance(own, dict) else content
    return {str(key): value for key, value in fields.items() if group == "." or key != "defaults"}  # it chooses options


def option_values(group: str, option: str, folder: Path | None = None) -> dict[str, Any]:
    """Return full key -> value of everything that an option's file sets, with interpolations unresolved."""
    file = _option_file(group, option, folder or conf_dir())
    content = _content(file)
    for_all = "@package _global_" in file.read_text()
    values = _flat(content if for_all else {group: content})
    return {key: value for key, value in values.items() if key != "defaults"}  # an experiment chooses options


def values_of(chosen: Mapping[str, str | None], folder: Path) -> dict[str, tuple[Any, str]]:
    """Return full key -> (value, `group=option`) of everything that the chosen options set; the last option wins. An
    option without a file (a user's class, a combination) sets nothing."""
    values: dict[str, tuple[Any, str]] = {}
    for group, option in chosen.items():
        if option is not None and _option_file(group, option, folder).is_file():
            own = option_values(group, option, folder)
            values |= {key: (value, f"{group}={option}") for key, value in own.items()}
    return values


def option_text(group: str, option: str) -> str:
    """Return the first sentence of the comment in an option's file, else of its class's docstring."""
    comment = option_comment(group, option)
    return first_sentence(comment or headline(import_part(group, option_values(group, option)[f"{group}._target_"])))


def first_sentence(text: str) -> str:
    """Return the first sentence without its full stop."""
    return re.split(r"(?:(?<=\w{3}\.)|(?<=\)\.))\s", " ".join(text.split()))[0].rstrip(".")


def option_comment(group: str, option: str) -> str:
    """Return the comment at the head of an option's file as one line; it may be empty."""
    lines = _option_file(group, option, conf_dir()).read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if re.match(r"# (?!@package)", line))


def headline(cls: type) -> str:
    """Return the first paragraph of the docstring of a class, or else of its module."""
    text = (cls.__doc__ or sys.modules[cls.__module__].__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(text.split())


def _option_file(group: str, option: str, folder: Path) -> Path:
    return folder / (group if (folder / group).is_dir() else borrowed_options(folder)[group]) / f"{option}.yaml"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {full: leaf for key, value in tree.items() for full, leaf in _flat(value, f"{prefix}{key}.").items()}


def default_part(kind: str) -> dict[str, Any]:
    """Return the default option of a part with every field filled in."""
    folder = conf_dir()
    fields = option_fields(folder, kind, default_options(folder)[kind] or "")
    target = fields.pop("_target_")
    if target is None:
        return {"_target_": None}
    cls = import_part(kind, target)
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", **cls.Config(**fields).model_dump(mode="json")}


@dataclass
class Sources:
    typed: Mapping[str, str]
    """Full key or group -> the argument as typed."""
    options: dict[str, str] = field(default_factory=dict)
    """Swappable part -> its option or class."""
    file: Path | None = None
    in_file: set[str] = field(default_factory=set)
    """Full keys that the file sets."""
    presets: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Full key -> (value, `group=option`) of what the chosen options set."""

    def origin(self, key: str) -> str:
        """Describe where the value of `key` comes from."""
        if key in self.typed or self._whole(key):
            return "as typed"
        if any(name in self.in_file for name in (key, *_parents(key))):
            return f"from {self.file}"
        return f"set by {self.presets[key][1]}" if key in self.presets else "the default"

    def where(self, key: str, value: Any) -> str:
        """Return the argument that set `key`, or `key=value` and its file; `key` alone if nothing set it."""
        if key in self.options:
            chosen = self.typed.get(f"{key}._target_") or self.typed.get(key)
            return chosen or f"{key}={self.options[key]}"
        if key in self.typed:
            return self.typed[key]
        below = [argument for name, argument in self.typed.items() if name.startswith(f"{key}.")]
        whole = self._whole(key)
        if isinstance(value, dict) and below:
            return below[-1]  # `seed.x=1` turns a value into a section
        if whole:
            return whole[0]
        text = key if value is None or isinstance(value, dict) else f"{key}={spelled(value)}"
        if any(name in self.in_file for name in (key, *_parents(key))):
            return f"{self.file}: {text}"
        preset, option = self.presets.get(key, (None, ""))
        return text if value is None or preset != value else f"{text} (set by {option})"

    def _whole(self, key: str) -> list[str]:
        """Return the arguments that set a whole section above `key`: `trainer={total_steps: 3}`."""
        return [self.typed[name] for name in _parents(key) if "={" in self.typed.get(name, "")]


def merge_file(
    composed: DictConfig, file: Path, choices: Mapping[str, Any], sources: Sources, without: Collection[str] = ()
) -> list[ConfigIssue]:
    """Merge a configuration file into the composed values; return its problems. A part with a `_target_` is replaced
    as a whole. `without`: sections that are not read."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        return [ConfigIssue(f"--config {file}", f"cannot be read: {' '.join(str(error).split())}")]
    if not isinstance(content, dict):
        return [ConfigIssue(f"--config {file}", "is not a configuration: it must be a mapping of sections")]
    for key in ("run_dir", "resume", *without):  # they belong to the run that wrote the file
        content.pop(key, None)
    sources.file = file
    problems = []
    for section, value in content.items():
        if section in choices:
            message = f"{file} already sets {section}; to change its keys, write only {section}.KEY=VALUE"
            problems.append(ConfigIssue(sources.typed[section], message))
            continue
        listed = section == "reward" and isinstance(value, list)  # parts of a combination
        if isinstance(composed.get(section), DictConfig) and not (isinstance(value, dict | None) or listed):
            message = f"is a section of keys; an option is chosen on the command line, like {section}=OPTION"
            problems.append(ConfigIssue(f"{file}: {section}={spelled(value)}", message))
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


PATH_KEYS = ("path", "template", "file", "folder", "dir")
"""Keys whose names end in one of these hold paths."""


def at_home(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # no such user
        return path


def in_home(value: Any, key: str = "") -> Any:
    """Replace `~` at the start of a path by the user's home, which a shell does not do after `key=`."""
    if isinstance(value, dict):
        return {name: in_home(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [in_home(inner, key) for inner in value]
    if isinstance(value, str) and value.startswith("~") and key.endswith((*PATH_KEYS, "resume")):
        return at_home(value)
    return value


def set_value(composed: DictConfig, key: str, value: Any) -> None:
    """Set one full key, creating sections as needed; validation later reports a key that does not exist."""
    OmegaConf.update(composed, key, value, merge=True, force_add=True)


def _parents(key: str) -> list[str]:
    steps = key.split(".")
    return [".".join(steps[:end]) for end in range(len(steps) - 1, 0, -1)]


def spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def add_parts(
    composed: DictConfig, folder: Path, options: Collection[str], chosen: Mapping[str, str], file: Path | None
) -> tuple[dict[str, str], list[ConfigIssue]]:
    """Put the parts of `reward=[a,b]`, or of a list in the file, into `composed`.

    Return the reward's name for messages (empty if it is not a list), and the file's problems.
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
    """Return notes on the keys of parts that do not exist (`reward.parts.polr.weight`)."""
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
