"""Tools: methods that the policy may call, with a schema from their signature and docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rlkit.experience import UserError

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "__rlkit_tool__"


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments."""
    check: Callable[[Mapping[str, Any]], str] | None = None
    """Returns what is wrong with the arguments, or an empty text; None: whatever runs the tool checks them."""

    def schema(self) -> dict[str, Any]:
        """Return the schema in the form that chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def wrong(self, arguments: Mapping[str, Any]) -> str:
        return "" if self.check is None else self.check(arguments)


class ToolsChangedError(UserError):
    """The tools are no longer those that the run's prompts describe; this ends the run."""


def changes(before: Sequence[Tool], after: Sequence[Tool]) -> str:
    """Describe the differences; empty if there are none.

    >>> add, mul = Tool("add", "Add.", {}), Tool("mul", "Multiply.", {})
    >>> changes([add], [mul]), changes([add], [Tool("add", "Sum.", {})]), changes([add], [add])
    ('add is gone; mul is new', 'add has a different description', '')
    """
    old, new = ({tool.name: tool for tool in tools} for tools in (before, after))
    differences = [f"{name} is gone" for name in old if name not in new]
    differences += [f"{name} is new" for name in new if name not in old]
    for name in old.keys() & new.keys():
        if old[name].description != new[name].description:
            differences.append(f"{name} has a different description")
        if old[name].parameters != new[name].parameters:
            differences.append(f"{name} has different arguments")
    if not differences and list(old) != list(new):
        differences.append("they are in a different order")
    return "; ".join(sorted(differences))


def tool(method: F) -> F:
    """Mark a method as a tool that the policy may call.

    Its docstring describes it: the first paragraph describes the tool, and lines `name: what it is` the arguments,
    whose types are the annotations. It returns what the policy reads, or a Step. Exceptions are shown to the policy as
    well.
    """
    setattr(method, _MARK, True)
    return method


def tools_of(cls: type) -> tuple[Tool, ...]:
    """Return the tools of a class, by name. Raises TypeError for one without a docstring or with an untyped
    argument."""
    methods = inspect.getmembers(cls, lambda member: getattr(member, _MARK, False))
    return tuple(_tool(name, method) for name, method in methods)


def _tool(name: str, method: Callable[..., Any]) -> Tool:
    description, of_arguments = _described(inspect.getdoc(method) or "")
    if not description:
        raise TypeError(f"the tool {name} needs a docstring: the policy reads it")
    hints, fields = get_type_hints(method), {}
    for argument in list(inspect.signature(method).parameters.values())[1:]:
        if argument.name not in hints:
            raise TypeError(f"the tool {name}: its argument {argument.name} has no type")
        default = ... if argument.default is inspect.Parameter.empty else argument.default
        fields[argument.name] = (hints[argument.name], Field(default, description=of_arguments.get(argument.name)))
    model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)  # type: ignore[call-overload]
    return Tool(name, description, _plain_schema(model), lambda arguments: _mistakes(model, arguments))


def _described(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the description, and those of the arguments."""
    found = dict(re.findall(r"^\s*(\w+): (.+)$", docstring, re.MULTILINE))
    first = re.split(r"\n\s*\n|\n\s*\w+: ", docstring.strip(), maxsplit=1)[0]
    inline = re.split(r"(?<=[.!?]) (?=\w+: )", " ".join(first.split()))
    found |= dict(part.split(": ", 1) for part in inline[1:])
    return inline[0], found


def _plain_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema without pydantic's titles, which only repeat the names."""

    def without_titles(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_titles(v) for k, v in value.items() if not (k == "title" and isinstance(v, str))}
        return [without_titles(item) for item in value] if isinstance(value, list) else value

    schema = without_titles(model.model_json_schema())
    schema.pop("additionalProperties", None)
    plain: dict[str, Any] = schema
    return plain


def _mistakes(model: type[BaseModel], arguments: Mapping[str, Any]) -> str:
    try:
        model.model_validate(dict(arguments))
    except ValidationError as error:
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return ""
