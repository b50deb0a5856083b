"""Messages about a wrong configuration: all issues are reported together, each with its remedy."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlkit.config.vocabulary import Meaning, answer, meanings
from rlkit.experience import UserError
from rlkit.experience.names import edits, nearest


@dataclass(frozen=True)
class ConfigIssue:
    where: str
    """The argument as typed, or `key=value`. A check gives only the key, which loading replaces by one of these."""
    message: str
    """What is wrong and how to put it right."""
    warning: bool = False
    """The run may start nevertheless."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def of_the_verifier(issue: ConfigIssue) -> ConfigIssue:
    """Replace `reward.x` by `verifier.x` in a message that a reward used as the verifier wrote."""
    return replace(issue, message=re.sub(r"\breward(?=[.=]\w)", "verifier", issue.message))


def of_the_set(issue: ConfigIssue, key: str) -> ConfigIssue:
    """Replace `data.x` by the key of a held-out set in a message that its data source wrote."""
    return replace(issue, message=named_as_set(issue.message, key))


def named_as_set(text: str, key: str) -> str:
    return re.sub(r"(?<![\w.])data(?==\w)", f"{key}.data", re.sub(r"(?<![\w.])data(?=\.\w)", key, text))


class ConfigError(UserError):
    def __init__(self, problems: Sequence[ConfigIssue]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.report())

    def report(self, hint: str = "") -> str:
        """Return the report. `hint`: what else may help, as the end of a sentence."""
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = [f"rlkit: {head} in the configuration", *(f"  - {problem}" for problem in self.problems)]
        return "\n".join([*lines, f"Nothing was started. `--help` lists every key{hint}."])


Issues = Iterator[ConfigIssue]


_PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", dict: "a mapping"}


def all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field of a section with its full key (`trainer.total_steps`), including nested sections."""
    for name, info in model.model_fields.items():
        nested = section_type(info.annotation)
        if nested is not None:
            yield from all_fields(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the class of a field that is a section (`Sub` or `Sub | None`), else None."""
    models = [kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0] if len(models) == 1 else None


def allowed(info: FieldInfo) -> str:
    """Describe what a field takes: `an integer, at least 1`, `one of auto, float32`."""
    return _describe(info.annotation, info.metadata)


def literal_values(info: FieldInfo) -> list[str]:
    return [str(value) for kind in _alternatives(info.annotation) for value in get_args(kind) if _is_literal(kind)]


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _alternatives(member)]
    return [annotation]


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _describe(inner, [*metadata, *more])
    words = " or ".join(dict.fromkeys(_one(kind) for kind in _alternatives(annotation)))
    bounds = list(_bounds(metadata))
    return f"{words}, {' and '.join(bounds)}" if bounds else words


def _one(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if kind in _PLAIN:
        return _PLAIN[kind]
    if _is_literal(kind):
        return f"one of {', '.join(str(value) for value in get_args(kind))}"
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)} ({', '.join(_describe(member) for member in inner)})"
    if origin in (list, tuple, set, frozenset) and inner:
        return f"a list ({_describe(inner[0])} each)"
    if origin in (dict, Mapping):
        return "a mapping"
    return getattr(kind, "__name__", str(kind))


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        match item:
            case FieldInfo():  # Field(...) inside Annotated
                yield from _bounds(item.metadata)
            case annotated_types.Ge(ge=bound):
                yield f"at least {bound}"
            case annotated_types.Gt(gt=bound):
                yield f"above {bound}"
            case annotated_types.Le(le=bound):
                yield f"at most {bound}"
            case annotated_types.Lt(lt=bound):
                yield f"below {bound}"
            case annotated_types.MinLen(min_length=bound):
                yield f"of length at least {bound}"
            case _:
                pass


def did_you_mean(name: str, valid: Collection[str]) -> str:
    guess = nearest(name, valid)
    listed = f"available: {', '.join(sorted(valid))}" if valid else "none is available"
    return f"did you mean {guess}? {listed}" if guess else listed


def unknown_key(key: str, known_keys: Collection[str], value: object = None) -> str:
    return f"no such key; {_instead(key, known_keys, value)}"


def _instead(key: str, known_keys: Collection[str], value: object) -> str:
    """Say what the unknown `key` may mean: another framework's name, the same field in another section, something that
    rlkit does not have, or the nearest spelling."""
    section, _, leaf = key.rpartition(".")
    leaves = {full: full.rpartition(".")[2] for full in known_keys}
    tops = {full.partition(".")[0] for full in leaves}
    same = sorted((full for full, own in leaves.items() if own == leaf), key=lambda full: edits(full, key))
    same = [full for full in same if full.replace("critic.", "learner.") not in same or not full.startswith("critic.")]
    wish = answer(key)
    if wish is not None and section not in ("reward", "verifier"):  # a reward's `max_length` is its own
        same = [full for full in same if not full.startswith(("reward.", "verifier."))]
    if elsewhere := _elsewhere(key, value, leaves, same):
        return elsewhere
    if same:
        return _meant(same)
    inside = {own: full for full, own in leaves.items() if section and full == f"{section}.{own}"}
    near = nearest(leaf, inside)
    if near is not None and (wish is None or edits(leaf, near) == 1):
        return _meant([inside[near]])
    if wish is not None:
        return wish
    top = key.partition(".")[0]
    if not section and (group := next((name for name in tops if edits(name, top) == 1), None)):
        return f"did you mean {group}?"
    other = nearest(leaf, set(leaves.values())) if len(leaf) > 2 else None
    if other is not None:
        return _meant([full for full, own in leaves.items() if own == other])
    own_keys = sorted(full for full in leaves if full.startswith(f"{top}."))
    if not own_keys:
        guess = nearest(top, tops)
        return f"did you mean {guess}?" if guess else "--help lists all keys"
    listed = f"{top} has {', '.join(own_keys)}"
    return listed if len(own_keys) <= SHOWN_KEYS else f"--help {top} lists the keys of {top}"


def _elsewhere(key: str, value: object, leaves: Mapping[str, str], same: Sequence[str]) -> str | None:
    """Return the answer if other frameworks use this name for something that rlkit has; else None.

    `leaves`: every rlkit key with its last part; `same`: those that share the last part of `key`.
    """
    section, tops = key.rpartition(".")[0], {full.partition(".")[0] for full in leaves}

    def ours(name: str) -> str:
        """Return the key in the section where it was typed: critic.lr is the critic's, a held-out set's prompt_key its
        own."""
        leaf = name.rpartition(".")[2]
        beside = f"{section}.{leaf}"
        namesakes = [full for full, own in leaves.items() if own == leaf and name.partition(".")[0] not in tops]
        return beside if beside in leaves else next(iter(namesakes), name)

    found = [
        replace(meaning, here=tuple(ours(name) if name in meaning.keys else name for name in meaning.here))
        for meaning in meanings(key, value)
    ]
    found = [meaning for meaning in found if all(name.partition(".")[0] in tops for name in meaning.keys)]
    there = [meaning for meaning in found if all(name in leaves for name in meaning.keys)]
    own = [meaning for meaning in there if set(meaning.here) <= set(same)]
    chosen = own or there or found
    if not chosen:
        return None
    if not there:
        here = " and ".join(chosen[0].here)
        part = chosen[0].keys[0].partition(".")[0]
        return f"here it is called {here}, which the chosen {part} does not have (--help {part}){_differs(chosen)}"
    names = [" and ".join(meaning.here) for meaning in chosen]
    if all(meaning.framework == "others" for meaning in chosen):
        names += [full for full in same if full not in names]
    if not chosen[0].keys:
        return f"that is {' or '.join(names)}{_differs(chosen)}"
    return f"did you mean {' or '.join(names)}?{_differs(chosen)}"


def _differs(found: Sequence[Meaning]) -> str:
    told = [meaning.differs for meaning in found if meaning.differs]
    return f" ({'; '.join(dict.fromkeys(told))})" if told else ""


def _meant(keys: Sequence[str]) -> str:
    return f"did you mean {keys[0]}?" if len(keys) == 1 else f"did you mean one of {', '.join(keys[:3])}?"


SHOWN_KEYS = 5

MISSING = "???"
"""Hydra's marker of a value that the user must set."""

Model = TypeVar("Model", bound=BaseModel)

Where = Callable[[str, Any], str]
"""(full key, value) -> how the user set it: the argument as typed, or `key=value` and its file."""


def validate(
    model: type[BaseModel],
    tree: Mapping[str, Any],
    prefix: str,
    known_keys: Collection[str],
    where: Where,
    notes: Mapping[str, str],
) -> tuple[BaseModel | None, list[ConfigIssue]]:
    """Return the typed section, or None and the issues.

    `prefix` (`reward.`) precedes all keys in messages; `notes` explain some unknown keys.
    """
    missing = list(_missing(tree, prefix))
    fields = dict(all_fields(model, prefix))
    problems = [_needs_a_value(key, fields) for key in missing]
    section, errors = read_section(model, tree)
    for details in errors:
        key = prefix + ".".join(str(step) for step in details["loc"]) if details["loc"] else prefix.rstrip(".")
        if key in missing:
            continue
        if details["type"] == "extra_forbidden":
            for leaf, value in _leaves(key, details["input"]):
                note = None if any(one.by_value for one in meanings(leaf, value)) else notes.get(leaf)
                message = f"no such key: {note}" if note else unknown_key(leaf, known_keys, value)
                problems.append(ConfigIssue(where(leaf, value), message))
        else:
            problems.append(_problem(key, details, fields, where))
    return (None if problems else section), list(dict.fromkeys(problems))


def read_section(model: type[Model], tree: Mapping[str, Any]) -> tuple[Model | None, list[ErrorDetails]]:
    """Return the typed section, or pydantic's errors. Unlike in its strict mode, lists are accepted for tuples and
    strings for paths."""
    errors = []
    try:
        model.model_validate(dict(tree), strict=True)
    except ValidationError as error:
        errors += [
            details
            for details in error.errors(include_url=False)
            if details["type"] in ("int_type", "float_type") and isinstance(details["input"], bool)
        ]
    try:
        section = model.model_validate(dict(tree))
    except ValidationError as error:
        return None, errors + error.errors(include_url=False)
    return (None if errors else section), errors


def _needs_a_value(key: str, fields: Mapping[str, FieldInfo]) -> ConfigIssue:
    words = literal_values(fields[key]) if key in fields else []
    about = (fields[key].description or "").partition(". ")[0].rstrip(".") if key in fields else ""
    what = f", one of {', '.join(words)}" if words else ""
    about = f" ({about})" if about and not words else ""
    return ConfigIssue(key, f"needs a value{what}; write {key}={words[0] if words else 'VALUE'}{about}")


def _problem(key: str, details: ErrorDetails, fields: Mapping[str, FieldInfo], where: Where) -> ConfigIssue:
    kind, value = details["type"], details.get("input")
    name = _field_name(key, fields)
    info = fields.get(name) if name else None
    if kind == "missing" and (name is None or name == key):
        return _needs_a_value(key, fields)
    if kind in ("value_error", "assertion_error"):  # the section's own validator explains it best
        message = str(details["ctx"]["error"])
        return ConfigIssue(where(*_blamed(key, value, message)), message)
    if name is None or info is None:
        return ConfigIssue(where(key, value), f"{details['msg'][0].lower()}{details['msg'][1:]}")
    words = literal_values(info)
    guess = nearest(str(value), words) if words else None
    expected = must_be(details, info)
    return ConfigIssue(where(name, value), f"did you mean {guess}? {expected}" if guess else expected)


def _blamed(key: str, value: Any, message: str) -> tuple[str, Any]:
    """Return the first key that the message of a section's validator mentions, with its value; else the section."""
    if not isinstance(value, Mapping):
        return key, value
    places = {name: re.search(rf"(?<![\w.]){re.escape(str(name))}\b", message) for name in value}
    named = [(place.start(), str(name)) for name, place in places.items() if place]
    return (f"{key}.{min(named)[1]}", value[min(named)[1]]) if named and key else (key, None)


def must_be(details: ErrorDetails, info: FieldInfo) -> str:
    endless = isinstance(details["input"], float) and not math.isfinite(details["input"])
    example = info.default if isinstance(info.default, tuple) and info.default else ()
    like = f", like [{','.join(map(str, example))}]" if example else ""
    return f"must be {'finite: ' if endless else ''}{allowed(info)}{like}"


def _field_name(key: str, fields: Mapping[str, FieldInfo]) -> str | None:
    while key:
        if key in fields:
            return key
        key = key.rpartition(".")[0]
    return None


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (full key, value) of everything below an unknown section, or the key itself if it is a value."""
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
