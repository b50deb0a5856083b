"""The user's function: found by its dotted path, and what its signature asks for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlkit.experience import UserError

GIVEN = ("prompts", "completions", "completion_ids", "references", "answer")
"""Arguments that every function may take besides data columns."""


class FunctionError(UserError, ValueError):
    """A function that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class RewardFunction:
    """A function with the names of its arguments."""

    call: Callable[..., Any]
    name: str
    required: tuple[str, ...]
    """Arguments without a default."""
    optional: tuple[str, ...]
    takes_all: bool
    """It has `**columns` (or any other name)."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Data columns that it cannot do without."""
        return tuple(name for name in self.required if name not in GIVEN)

    def wants(self, name: str) -> bool:
        """Whether it takes an argument of this name."""
        return self.takes_all or name in self.required or name in self.optional


def load_function(path: str) -> RewardFunction:
    """The function at `my_module.my_function` (or `my_module.Class.method`). Raises FunctionError."""
    function = _find(path)
    if inspect.isclass(function):
        raise FunctionError(f"reward.function={path}: is a class; a Reward class is named by reward._target_={path}")
    if not callable(function):
        raise FunctionError(f"reward.function={path}: is a {type(function).__name__}, not a function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise FunctionError(f"reward.function={path}: its arguments cannot be read: {error}") from error
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    loaded = RewardFunction(
        call=function,
        name=path,
        required=tuple(p.name for p in by_name if p.default is p.empty),
        optional=tuple(p.name for p in by_name if p.default is not p.empty),
        takes_all=any(p.kind == p.VAR_KEYWORD for p in parameters),
    )
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_ONLY]
    if positional:
        raise FunctionError(f"reward.function={path}: takes {', '.join(positional)} by position only; drop the `/`")
    if not loaded.wants("completions"):
        raise FunctionError(
            f"reward.function={path}: has no argument `completions`: f(prompts, completions, **columns)"
        )
    return loaded


def _find(path: str) -> Any:
    """The innermost attribute of the longest module name that `path` begins with."""
    names = path.split(".")
    if len(names) < 2 or not all(name.isidentifier() for name in names):
        raise FunctionError(f"reward.function={path}: must be a dotted path, like my_module.my_function")
    for end in range(len(names) - 1, 0, -1):
        module_name = ".".join(names[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue  # perhaps a class of a shorter module name
            raise FunctionError(f"reward.function={path}: {module_name} cannot be imported: {error}") from error
        except Exception as error:  # whatever a module of the user's raises while it is imported
            cause = f"{type(error).__name__}: {error}"
            raise FunctionError(f"reward.function={path}: {module_name} cannot be imported: {cause}") from error
        for name in names[end:]:
            if not hasattr(found, name):
                raise FunctionError(f"reward.function={path}: {module_name} has no {'.'.join(names[end:])}")
            found = getattr(found, name)
        return found
    raise FunctionError(
        f"reward.function={path}: there is no module {names[0]} (looked in the current folder and in the installed "
        "packages)"
    )
