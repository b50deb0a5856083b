"""`reward=[math,polar]`: a list of reward options stands for their combination."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from rlkit.config.compose import option_fields
from rlkit.config.names import did_you_mean, nearest
from rlkit.config.problems import Problem

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
COMBINED = "combined"
"""The option that holds the parts."""


def part_names(value: Sequence[Any], options: Collection[str]) -> tuple[dict[str, str], str | None]:
    """Name of each part -> option or dotted path of a class; and what is wrong with the list, if anything is.

    An element is an option, a dotted path (the part is named like the class), or `{name: option}`. A misspelt option
    is replaced by the nearest one, so that the rest can be checked too.
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
) -> tuple[dict[str, str], list[Problem]]:
    """Put the parts that the command line chose, or that a file lists (`reward: [rule, polar]`), into `composed`.

    Returns how the reward is to be called in messages (empty if it is no list), and the file's mistakes.
    """
    problems = []
    section = composed.get("reward")
    if isinstance(section, ListConfig):  # only a file can do that
        listed = OmegaConf.to_container(section)
        assert isinstance(listed, list)
        chosen, message = part_names(listed, options)
        if message:
            problems.append(Problem(f"{file}: reward", message))
        composed["reward"] = option_fields(folder, "reward", COMBINED)
    if not chosen:
        return {}, problems
    for name, option in chosen.items():
        fields = {"_target_": option} if "." in option else option_fields(folder, "reward", option)
        OmegaConf.update(composed, f"reward.parts.{name}", fields, force_add=True)
    composed.hydra.runtime.choices["reward"] = "+".join(chosen)
    return {"reward": f"[{','.join(chosen)}]"}, problems


def unknown_parts(section: Mapping[str, Any]) -> dict[str, str]:
    """Notes on the keys of parts that are not there (`reward.parts.polr.weight`)."""
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


def in_part(problem: Problem) -> Problem:
    """What a part's own validator says about `reward.x` is meant of `reward.parts.NAME.x`."""
    place = re.match(r".*?(reward(?:\.parts\.\w+)+)", problem.where)
    if place is None or problem.message.startswith("no such key"):
        return problem
    return Problem(problem.where, re.sub(r"\breward\.(?!parts\b)(?=\w)", f"{place.group(1)}.", problem.message))


def _leaves(section: Mapping[str, Any]) -> list[str]:
    found = []
    for key, value in section.items():
        found += [f"{key}.{leaf}" for leaf in _leaves(value)] if isinstance(value, Mapping) and value else [str(key)]
    return found
