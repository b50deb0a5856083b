"""Parsing of sections: a reward by `_target_`, a small part with options (a shaping step, a combiner) by `kind`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import model_validator
from pydantic_core import ErrorDetails

from rewards.base import Reward, RewardConfig
from rlkit.experience.section import Section


def load_part(section: Mapping[str, Any]) -> tuple[type[Reward], RewardConfig]:
    """Class and options of a section with `_target_`. Raise PartError or pydantic's ValidationError."""
    from rlkit.config.parts import import_part

    kind: type[Reward] = import_part("reward", section.get("_target_"))
    return kind, kind.Config(**{key: value for key, value in section.items() if key != "_target_"})


class Named(Section):
    """A small part; its fields are its options."""

    kind: str = ""
    """The name of a part of the package, or the dotted path of a class of yours."""

    @model_validator(mode="before")
    @classmethod
    def _with_kind(cls, fields: Any) -> Any:
        path = cls.model_fields["kind"].default or f"{cls.__module__}.{cls.__qualname__}"
        return {"kind": path, **fields} if isinstance(fields, Mapping) else fields


T = TypeVar("T", bound=Named)


def read_named(value: Any, known: Mapping[str, type[T]], base: type[T], what: str) -> T:
    """A part from its kind, or from a mapping with kind and options; a part stays as it is.

    `what` (`step 2`) begins the messages. Raise ValueError with all mistakes.
    """
    from rlkit.config.messages import read_section

    if isinstance(value, base):
        return value
    fields = {"kind": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        raise ValueError(f"{what} must be a name or a mapping with a kind, not {value!r}")
    kind = fields.get("kind")
    if kind is None:
        raise ValueError(f"{what} has no kind; available: {', '.join(sorted(known))}")
    cls = _class(kind, known, base, what)
    part, errors = read_section(cls, fields)
    if part is None:
        raise ValueError("; ".join(dict.fromkeys(_mistakes(errors, cls, f"{what} ({kind})"))))
    return part


def _class(kind: Any, known: Mapping[str, type[T]], base: type[T], what: str) -> type[T]:
    from rlkit.config.messages import did_you_mean
    from rlkit.config.parts import PartError, import_class

    if kind in known:
        return known[kind]
    if "." not in str(kind):
        raise ValueError(f"{what}: there is no kind {kind!r}; {did_you_mean(str(kind), known)}")
    try:
        cls: type[T] = import_class(what.rstrip(" 0123456789"), kind, base)
    except PartError as error:
        raise ValueError(f"{what}: {kind} {error}") from error
    return cls


def _mistakes(errors: Sequence[ErrorDetails], cls: type[Named], where: str) -> Iterator[str]:
    from rlkit.config.messages import did_you_mean, must_be

    for details in errors:
        if details["type"] == "value_error":
            yield f"{where} {details['ctx']['error']}"
            continue
        name = str(details["loc"][0])
        field = cls.model_fields.get(name)
        if field is None:
            others = [option for option in cls.model_fields if option != "kind"]
            yield f"{where}: {name} is no option of it; {did_you_mean(name, others)}"
        elif details["type"] == "missing":
            yield f"{where}: {name} is needed"
        else:
            value = details["input"]
            yield f"{where}: {name if isinstance(value, bool) else f'{name}={value}'} {must_be(details, field)}"
