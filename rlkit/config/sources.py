"""Where values come from: the command line, a configuration file, the option files; for messages and merging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from rlkit.config.problems import Problem


@dataclass
class Sources:
    """Knows for every key how the user wrote it."""

    typed: Mapping[str, str]
    """Full key (or group) -> the argument as it was typed."""
    options: dict[str, str] = field(default_factory=dict)
    """Swappable part -> the option (or class) that stands for it."""
    file: Path | None = None
    in_file: set[str] = field(default_factory=set)
    """Full keys of values that the file sets."""

    def where(self, key: str, value: Any) -> str:
        """The argument that set `key`, or `key=value` and the file it is from; `key` alone if nothing set it."""
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


def merge_file(composed: DictConfig, file: Path, choices: Mapping[str, Any], sources: Sources) -> list[Problem]:
    """Put the values of a configuration file over the composed ones; returns what is wrong with the file.

    A part with a `_target_` replaces the composed part: its values are those of another class.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        return [Problem(f"--config {file}", f"cannot be read: {' '.join(str(error).split())}")]
    if not isinstance(content, dict):
        return [Problem(f"--config {file}", "is not a configuration: it must be a mapping of sections")]
    content.pop("run_dir", None)  # that folder holds the run that wrote the file
    sources.file = file
    problems = []
    for section, value in content.items():
        if section in choices:
            message = f"{file} sets {section} already; leave one of them out"
            problems.append(Problem(sources.typed[section], message))
            continue
        listed = section == "reward" and isinstance(value, list)  # parts of a combination
        if isinstance(composed.get(section), DictConfig) and not (isinstance(value, dict | None) or listed):
            message = f"is a section of keys; an option is chosen on the command line, like {section}=OPTION"
            problems.append(Problem(f"{file}: {section}={_spelled(value)}", message))
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
    """Set one full key, making sections on the way; validation says later whether the key exists."""
    OmegaConf.update(composed, key, value, merge=True, force_add=True)


def _parents(key: str) -> list[str]:
    steps = key.split(".")
    return [".".join(steps[:end]) for end in range(len(steps) - 1, 0, -1)]


def _spelled(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
