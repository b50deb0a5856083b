"""The base of everything that a user configures, and the bounds that many options share."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Options: no unknown keys, no later changes, finite numbers; the string under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Named(Section):
    """A small part; its fields are its options."""

    kind: str = ""
    """The name of a part of the package, or the dotted path of a class of yours."""

    @model_validator(mode="before")
    @classmethod
    def _with_kind(cls, fields: Any) -> Any:
        path = cls.model_fields["kind"].default or f"{cls.__module__}.{cls.__qualname__}"
        return {"kind": path, **fields} if isinstance(fields, Mapping) else fields


Coefficient = Annotated[float, Field(ge=0, le=1000)]
"""Weight of a term of a loss or of a reward."""
LearningRate = Annotated[float, Field(gt=0, le=1)]
"""Peak learning rate of AdamW, which moves each weight by at most about this much per step."""
Deadline = Annotated[float, Field(ge=0.1)]
"""Seconds after which a wait is given up; nothing answers sooner."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""What torch takes as a seed."""
