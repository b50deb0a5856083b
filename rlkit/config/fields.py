"""The fields of a typed section: their full names, and in words what each one takes."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", dict: "a mapping"}


def all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a section with its full key (`trainer.total_steps`), nested sections included."""
    for name, info in model.model_fields.items():
        nested = section_type(info.annotation)
        if nested is not None:
            yield from all_fields(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field whose value is a section (`Sub` or `Sub | None`), else None."""
    found = [kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if len(found) == 1 else None


def allowed(info: FieldInfo) -> str:
    """What a field takes: `an integer, at least 1`, `one of auto, float32`."""
    return _describe(info.annotation, info.metadata)


def literal_values(info: FieldInfo) -> list[str]:
    """The words a Literal field takes; empty for other fields."""
    return [str(value) for kind in _alternatives(info.annotation) for value in get_args(kind) if _is_literal(kind)]


def unsuitable_scalars(model: type[BaseModel], tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(full key, reason) for values that pydantic would take but nobody means: true as 1, inf as a size."""
    for name, value in tree.items():
        info = model.model_fields.get(name)
        if info is None:
            continue
        kinds = _alternatives(info.annotation)
        nested = section_type(info.annotation)
        if nested is not None and isinstance(value, Mapping):
            yield from unsuitable_scalars(nested, value, f"{prefix}{name}.")
        elif isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            yield f"{prefix}{name}", f"must be {allowed(info)}"
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            yield f"{prefix}{name}", f"must be finite: {allowed(info)}"


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, an annotation by itself otherwise."""
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
