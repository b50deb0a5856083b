"""From a plain tree to a typed section; what pydantic finds wrong becomes problems that name the remedy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlkit.config.fields import all_fields, allowed, literal_values, unsuitable_scalars
from rlkit.config.names import nearest, similar_keys
from rlkit.config.problems import Problem

MISSING = "???"
"""Hydra's mark of a value that the user has to give."""

Where = Callable[[str, Any], str]
"""(full key, value) -> how the user knows it: the argument typed, or `key=value` and its file."""


def validate(
    model: type[BaseModel],
    tree: Mapping[str, Any],
    prefix: str,
    known_keys: Collection[str],
    where: Where,
    notes: Mapping[str, str],
) -> tuple[BaseModel | None, list[Problem]]:
    """The typed section, or None and why not.

    `prefix` (`reward.`) precedes all keys in messages; `notes` say about some unknown keys what is known of them.
    """
    missing = list(_missing(tree, prefix))
    problems = [Problem(key, f"needs a value; write {key}=VALUE") for key in missing]
    unsuitable = dict(unsuitable_scalars(model, tree, prefix))
    problems += [Problem(where(key, _at(tree, key, prefix)), message) for key, message in unsuitable.items()]
    fields = dict(all_fields(model, prefix))
    section = None
    try:
        section = model.model_validate(dict(tree))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            key = prefix + ".".join(str(step) for step in details["loc"]) if details["loc"] else prefix.rstrip(".")
            if key in missing or key in unsuitable:
                continue
            if details["type"] == "extra_forbidden":
                for leaf, value in _leaves(key, details["input"]):
                    note = notes.get(leaf)
                    message = f"no such key: {note}" if note else unknown_key(leaf, known_keys)
                    problems.append(Problem(where(leaf, value), message))
            else:
                problems.append(_problem(key, details, fields, where))
    return (None if problems else section), list(dict.fromkeys(problems))


def _problem(key: str, details: Any, fields: Mapping[str, FieldInfo], where: Where) -> Problem:
    kind, value = details["type"], details.get("input")
    if kind == "missing":
        return Problem(key, f"needs a value; write {key}=VALUE")
    name = _field_name(key, fields)
    info = fields.get(name) if name else None
    if kind in ("value_error", "assertion_error"):  # a validator of the section's own says it best
        return Problem(where(key, value), str(details["ctx"]["error"]))
    if name is None or info is None:
        return Problem(where(key, value), f"{details['msg'][0].lower()}{details['msg'][1:]}")
    words = literal_values(info)
    guess = nearest(str(value), words) if words else None
    expected = f"must be {allowed(info)}"
    return Problem(where(name, value), f"did you mean {guess}? {expected}" if guess else expected)


def unknown_key(key: str, known_keys: Collection[str]) -> str:
    """What to say about a key that does not exist."""
    similar = similar_keys(key, known_keys)
    if len(similar) == 1:
        return f"no such key; did you mean {similar[0]}?"
    if similar:
        return f"no such key; did you mean one of {', '.join(similar)}?"
    section = key.rpartition(".")[0]
    siblings = sorted(known for known in known_keys if section and known.startswith(f"{section}."))
    return f"no such key; {section} has {', '.join(siblings)}" if siblings else "no such key; --help lists all of them"


def _field_name(key: str, fields: Mapping[str, FieldInfo]) -> str | None:
    """The field that an error location lies in (`learner.betas.0` lies in `learner.betas`)."""
    while key:
        if key in fields:
            return key
        key = key.rpartition(".")[0]
    return None


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(full key, value) of everything below an unknown section; the key itself where it is a value."""
    if not isinstance(value, Mapping) or not value:
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _missing(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _missing(value, f"{prefix}{name}.")
        elif value == MISSING:
            yield f"{prefix}{name}"


def _at(tree: Mapping[str, Any], key: str, prefix: str) -> Any:
    value: Any = tree
    for step in key.removeprefix(prefix).split("."):
        value = value[step]
    return value
