"""Options of a combined reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from rewards.base import RewardConfig
from rewards.combined.aggregate import PESSIMISTIC, Combine
from rewards.combined.sections import PART_NAME, TARGET, Part, part_model, read_part
from rewards.shaping.parse import Shaping

NO_PARTS = "needs at least one part; write reward=[rule,polar], with names of reward options"


class CombinedFields(RewardConfig):
    """The options beside the parts."""

    timeout_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Deadline of one scoring call; by default the sum of the parts', which score one after the other. After it the
    worker is killed and replaced, and the call is tried once more."""
    combine: Combine = "sum"
    """How values become one: sum, mean (weighted), product, logical_and (sum of w log sigma(r)); for members that
    estimate the same: mean, median, min, mean_minus_std, mean_minus_variance."""
    spread_weight: float = Field(default=1.0, gt=0)
    """mean_minus_std and mean_minus_variance: how much of the spread is subtracted."""
    shaping: Shaping = ()
    """Steps applied to the combined scores, like [{kind:par,reference_value:0}]; a part may have its own before."""

    @model_validator(mode="before")
    @classmethod
    def _time_for_all_parts(cls, section: Any) -> Any:
        """The parts score one after the other: by default the deadline of a call is the sum of theirs."""
        if not isinstance(section, Mapping) or "timeout_seconds" in section:
            return section
        seconds = _seconds(section.get("parts"))
        return section if seconds is None else {**section, "timeout_seconds": seconds}

    @model_validator(mode="after")
    def _spread_acts(self) -> Self:
        if self.combine not in PESSIMISTIC and self.spread_weight != 1.0:
            raise ValueError(f"spread_weight has no effect with combine={self.combine}")
        return self


class CombinedConfig(CombinedFields):
    """Options of a combined reward."""

    parts: dict[str, Any] = Field(default={}, validate_default=True)
    """Name to section of each part: `_target_`, its reward's own fields, and `weight`, `when`, `shaping`."""

    @field_validator("parts")
    @classmethod
    def _complete(cls, parts: dict[str, Any]) -> dict[str, Any]:
        if not parts:
            raise ValueError(NO_PARTS)
        return {name: _read(name, section).section() for name, section in parts.items()}


def typed_model(section: Mapping[str, Any], plain: type[CombinedConfig]) -> type[BaseModel]:
    """`plain` with a typed section for each part, for messages as good as those about any other section.

    A part whose class cannot be used is a field that no value suits; one without `_target_` is no field at all.
    """
    parts = section.get("parts")
    if not isinstance(parts, Mapping) or not parts or not all(PART_NAME.fullmatch(str(name)) for name in parts):
        return plain  # says what is wrong
    fields: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, Mapping) and TARGET in part:
            try:
                fields[name] = (part_model(part), ...)
            except ValueError as error:
                fields[name] = (Annotated[Any, BeforeValidator(_refusal(f"{part[TARGET]} {error}"))], ...)
    if not fields:
        return plain
    strict = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    sections = create_model("Parts", __config__=strict, **fields)
    return create_model("Combined", __base__=CombinedFields, parts=(sections, ...))


def read_parts(config: CombinedConfig) -> tuple[Part, ...]:
    """The parts, in the order they were named."""
    return tuple(read_part(name, section) for name, section in config.parts.items())


def _read(name: str, section: Any) -> Part:
    try:
        return read_part(name, section)
    except ValidationError as error:
        wrong = (f"{name}.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError("; ".join(wrong)) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _refusal(message: str) -> Any:
    def refuse(_: Any) -> Any:
        raise ValueError(message)

    return refuse


def _seconds(parts: Any) -> float | None:
    """Sum of the deadlines of parts that are right so far; None if one of them is not (reported elsewhere)."""
    if isinstance(parts, BaseModel) or not isinstance(parts, Mapping) or not parts:
        return None
    total = 0.0
    for name, section in parts.items():
        try:
            total += read_part(str(name), section).config.timeout_seconds
        except (ValueError, TypeError):
            return None
    return total
