"""The base class of everything that a user configures, and bounds that many options share."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Options: no unknown keys, immutable, finite numbers; the string under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Named(Section):
    """A small component; its fields are its options."""

    kind: str = ""
    """The name of one of the package's components, or the dotted path of your own class."""

    @model_validator(mode="before")
    @classmethod
    def _with_kind(cls, fields: Any) -> Any:
        path = cls.model_fields["kind"].default or f"{cls.__module__}.{cls.__qualname__}"
        return {"kind": path, **fields} if isinstance(fields, Mapping) else fields


Coefficient = Annotated[float, Field(ge=0, le=1000)]
"""Weight of a term in a loss or a reward."""
LearningRate = Annotated[float, Field(gt=0, le=1)]
"""Peak learning rate of AdamW, which moves each weight by at most about this much per step."""
Deadline = Annotated[float, Field(ge=0.1)]
"""Seconds after which to give up waiting; the bound exists because nothing answers sooner."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A seed that torch accepts."""
