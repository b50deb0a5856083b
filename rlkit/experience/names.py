"""Resolve names that a user writes: the nearest valid spelling, and the object at a dotted path."""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from rlkit.experience.errors import UserError


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the name meant: at most one typo per four letters away, or the shortest with all the words of `name`."""
    typed = name.lower()
    spelled = {candidate.lower(): candidate for candidate in sorted(valid)}
    slips = {candidate: edits(typed, candidate) for candidate in spelled if len(typed) > 1}
    close = [word for word, count in slips.items() if count <= max(1, max(len(typed), len(word)) // 4)]
    if close:
        return spelled[min(close, key=lambda word: slips[word])]
    words = set(re.findall(r"[a-z0-9]+", typed))
    holding = [word for word in spelled if len(typed) > 1 and words and words <= set(re.findall(r"[a-z0-9]+", word))]
    return spelled[min(holding, key=len)] if holding else None


def edits(left: str, right: str) -> int:
    """Return how many letters to insert, delete, replace or swap with a neighbour to turn one text into the other."""
    above, row = list[int](), list(range(len(right) + 1))
    for i, letter in enumerate(left, 1):
        older, above, row = above, row, [i]
        for j, other in enumerate(right, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == right[j - 2] and left[i - 2] == other:
                row[j] = min(row[j], older[j - 2] + 1)
    return row[-1]


class NotFoundError(UserError, ValueError):
    """Raised if there is no object at a dotted path; the message says why, without the path."""


def find_object(path: str, suits: Callable[[Any], bool] = callable) -> Any:
    """Return the object at `my_module.name` or `my_module.Class.name`; error messages propose names that `suits`.

    Raises NotFoundError, also for anything that a user's module raises on import.
    """
    steps = path.split(".")
    if len(steps) < 2 or not all(step.isidentifier() for step in steps):
        raise NotFoundError("must be a dotted path, like my_module.my_function")
    for end in range(len(steps) - 1, 0, -1):
        module_name = ".".join(steps[:end])
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue  # the last part may be a class in a module with a shorter name
            raise NotFoundError(f"cannot be imported: {_cause(error)}") from error
        except Exception as error:
            raise NotFoundError(f"cannot be imported: {_cause(error)}") from error
        return _attribute(module, steps[end:], suits)
    raise NotFoundError(
        f"cannot be imported: there is no module {steps[0] if len(steps) == 2 else '.'.join(steps[:-1])} (looked in "
        "the current folder and in the installed packages)"
    )


def find_class(kind: str, path: Any, base: type) -> Any:
    """Return the concrete subclass of `base` at a dotted path; `kind` is for messages. Raises NotFoundError."""
    if not isinstance(path, str) or "." not in path:
        raise NotFoundError("must be the dotted path of a class, like my_module.MyClass")
    cls = find_object(path, inspect.isclass)
    name = f"{base.__module__}.{base.__name__}"
    if not inspect.isclass(cls):
        raise NotFoundError(f"is not a class but {type(cls).__name__}; it must be a subclass of {name}")
    if not issubclass(cls, base):
        raise NotFoundError(f"is not a subclass of {name}, which every {kind} must be")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise NotFoundError(f"lacks {', '.join(f'{method}()' for method in missing)}, which every {kind} must have")
    return cls


def _attribute(module: Any, steps: list[str], suits: Callable[[Any], bool]) -> Any:
    value = module
    for step in steps:
        if not hasattr(value, step):
            raise NotFoundError(_lacks(module, ".".join(steps), suits))
        value = getattr(value, step)
    return value


def _lacks(module: Any, name: str, suits: Callable[[Any], bool]) -> str:
    having = [known for known, value in vars(module).items() if suits(value) and not known.startswith("_")]
    if name == "py":
        own = [known for known in having if getattr(getattr(module, known), "__module__", None) == module.__name__]
        listed = f" (it has {', '.join(own)})" if own else ""
        return f"names a file; name what it defines: {module.__name__}.{own[0] if own else 'NAME'}{listed}"
    guess = nearest(name, having)
    hint = f"; did you mean {module.__name__}.{guess}?" if guess else f" ({module.__file__})"
    return f"cannot be imported: {module.__name__} has no {name}{hint}"


def _cause(error: BaseException) -> str:
    """Return `TypeError: text (file.py:12)`, with the innermost line outside the import machinery."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    line = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{line}"
