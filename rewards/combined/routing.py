"""Which prompts a part of a combined reward judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from rlkit.experience import Prompt

Scalar = bool | int | float | str


def _as_list(value: Any) -> Any:
    """One value may be written without brackets."""
    return [value] if isinstance(value, bool | int | float | str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Values = Annotated[tuple[Scalar, ...], BeforeValidator(_as_list)]


class When(BaseModel):
    """Conditions on the prompt, all of which must hold; none: every prompt.

    Columns are `answer`, `references`, and the data's others. Empty texts, empty lists and null count as absent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    has: Names = ()
    """Columns that must be present."""
    lacks: Names = ()
    """Columns that must be absent."""
    equals: Mapping[str, Values] = {}
    """Column to the value, or the list of values, of which it must have one; types count (1 is not '1')."""
    differs: Mapping[str, Values] = {}
    """Column to the value, or the list of values, of which it must have none; an absent column differs."""

    def applies(self, prompt: Prompt) -> bool:
        """Whether the part judges this prompt."""
        return (
            all(_present(_column(prompt, name)) for name in self.has)
            and not any(_present(_column(prompt, name)) for name in self.lacks)
            and all(_is_one_of(_column(prompt, name), values) for name, values in self.equals.items())
            and not any(_is_one_of(_column(prompt, name), values) for name, values in self.differs.items())
        )

    def columns(self) -> frozenset[str]:
        """What the data must provide; a column that must be absent need not exist, if it is one of rlkit's own."""
        absent = {name for name in self.lacks if name not in ("answer", "references")}
        return frozenset({*self.has, *absent, *self.equals, *self.differs})

    @property
    def always(self) -> bool:
        """Whether there is no condition."""
        return self == When()


def _column(prompt: Prompt, name: str) -> Any:
    if name in ("answer", "references"):
        return getattr(prompt, name)
    return prompt.columns.get(name)


def _present(value: Any) -> bool:
    if value is None:
        return False
    return len(value) > 0 if isinstance(value, str | Sequence | Mapping) else True


def _is_one_of(value: Any, values: Sequence[Scalar]) -> bool:
    """Equality that tells true from 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)
