"""The base of everything that a user configures."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Options: no unknown keys, no later changes, finite numbers; the string under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
