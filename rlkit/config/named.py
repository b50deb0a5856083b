"""Small parts chosen by `kind`, with options: a shaping step, a combiner, a diagnostic, a tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic_core import ErrorDetails

from rlkit.config.messages import did_you_mean, must_be, read_section
from rlkit.diagnostics.base import DiagnosticConfig
from rlkit.diagnostics.known import DIAGNOSTICS, diagnostic_class
from rlkit.experience.names import NotFoundError, find_class
from rlkit.experience.section import Named
from rlkit.trackers.base import TrackerConfig
from rlkit.trackers.known import TRACKERS, tracker_class

T = TypeVar("T", bound=Named)


def read_named(
    value: Any,
    known: Mapping[str, type[T]],
    base: type[T],
    what: str,
    find: Callable[[str], type[T]] | None = None,
) -> T:
    """Make a part from its kind, or from a mapping with kind and options; return a part unchanged.

    `what` (`step 2`) begins the messages. `find` gets the options' class from a dotted path, where the path does not
    name that class itself. Raise ValueError with all mistakes.
    """
    if isinstance(value, base):
        return value
    fields = {"kind": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        raise ValueError(f"{what} must be a name or a mapping with a kind, not {value!r}")
    kind = fields.get("kind")
    if kind is None:
        raise ValueError(f"{what} has no kind; available: {', '.join(sorted(known))}")
    cls: type[T] | None = known.get(kind)
    if cls is None:
        if "." not in str(kind):
            raise ValueError(f"{what}: there is no kind {kind!r}; {did_you_mean(str(kind), known)}")
        try:
            own: type[T] = find(kind) if find is not None else find_class(what.rstrip(" 0123456789"), kind, base)
            cls = own
        except NotFoundError as error:
            raise ValueError(f"{what}: {kind} {error}") from error
    part, errors = read_section(cls, fields)
    if part is None:
        raise ValueError("; ".join(dict.fromkeys(_mistakes(errors, cls, f"{what} ({kind})"))))
    return part


def parse_diagnostics(value: Any) -> tuple[DiagnosticConfig, ...]:
    """Parse the list of diagnostics. Raise a ValueError that names the wrong one."""
    known = {name: cls.Config for name, cls in DIAGNOSTICS.items()}
    chosen = _read_list(
        value, known, DiagnosticConfig, "diagnostic", "[hacking,{kind:drift,alarm:stop}]", _of_diagnostic
    )
    _refuse_twice([config.name for config in chosen], "its table and its state would share a name")
    return chosen


def parse_trackers(value: Any) -> tuple[TrackerConfig, ...]:
    """Parse the list of trackers. Raise a ValueError that names the wrong one."""
    known = {name: cls.Config for name, cls in TRACKERS.items()}
    chosen = _read_list(value, known, TrackerConfig, "tracker", "[tensorboard,{kind:wandb,project:mine}]", _of_tracker)
    _refuse_twice([config.name for config in chosen], "its entries in trackers.json would share a name")
    return chosen


def _of_diagnostic(kind: str) -> type[DiagnosticConfig]:
    return diagnostic_class(kind).Config


def _of_tracker(kind: str) -> type[TrackerConfig]:
    return tracker_class(kind).Config


def _read_list(
    value: Any, known: Mapping[str, type[T]], base: type[T], what: str, example: str, find: Callable[[str], type[T]]
) -> tuple[T, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(f"must be a list, like {example}")
    return tuple(read_named(item, known, base, f"{what} {number}", find) for number, item in enumerate(value, start=1))


def _refuse_twice(names: Sequence[str], why: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is listed twice; {why}")


def _mistakes(errors: Sequence[ErrorDetails], cls: type[Named], where: str) -> Iterator[str]:
    for details in errors:
        if details["type"] == "value_error":
            yield f"{where} {details['ctx']['error']}"
            continue
        name = str(details["loc"][0])
        field = cls.model_fields.get(name)
        if field is None:
            others = [option for option in cls.model_fields if option != "kind"]
            yield f"{where}: there is no option {name}; {did_you_mean(name, others)}"
        elif details["type"] == "missing":
            yield f"{where}: {name} is required"
        else:
            value = details["input"]
            yield f"{where}: {name if isinstance(value, bool) else f'{name}={value}'} {must_be(details, field)}"
