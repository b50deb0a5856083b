"""Options of a combined reward and its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

from rewards.base import Reward, RewardConfig, RewardTraits
from rewards.combined.scores import Combine, Combiner, parse_combiner
from rewards.shaping.steps import Shaping, Step
from rlkit.experience import Prompt
from rlkit.experience.section import Deadline, Section

Scalar = bool | int | float | str


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, bool | int | float | str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Values = Annotated[tuple[Scalar, ...], BeforeValidator(_as_list)]


class When(Section):
    """Conditions on the prompt, all of which must hold. Without any, every prompt passes.

    Columns are `answer`, `references` and the data's other columns. Empty texts, empty lists and null count as absent.
    """

    has: Names = ()
    """Columns that must be present."""
    lacks: Names = ()
    """Columns that must be absent."""
    equals: Mapping[str, Values] = {}
    """Column and its permitted value, or list of values; types matter (1 is not '1')."""
    differs: Mapping[str, Values] = {}
    """Column and the value, or list of values, that it must not have; an absent column passes."""

    def applies(self, prompt: Prompt) -> bool:
        return (
            all(_present(_column(prompt, name)) for name in self.has)
            and not any(_present(_column(prompt, name)) for name in self.lacks)
            and all(_is_one_of(_column(prompt, name), values) for name, values in self.equals.items())
            and not any(_is_one_of(_column(prompt, name), values) for name, values in self.differs.items())
        )

    def columns(self) -> frozenset[str]:
        """Return the columns that the data must have, including those in `lacks` except `answer` and `references`."""
        absent = {name for name in self.lacks if name not in ("answer", "references")}
        return frozenset({*self.has, *absent, *self.equals, *self.differs})

    @property
    def always(self) -> bool:
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
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


TARGET = "_target_"
PART_NAME = re.compile(r"(?!(?:unshaped|ensemble_std)$)[A-Za-z][A-Za-z0-9_]*")
"""Names appear in keys and metrics; the two excluded names are components of the combined score."""


class PartOptions(Section):
    weight: float = Field(default=1.0, ge=-1000, le=1000)
    """Weight of its value and process rewards, with combine=sum, logical_and or mean."""
    when: When = When()
    """Which prompts it judges; all conditions must hold."""

    @model_validator(mode="before")
    @classmethod
    def _without_target(cls, section: Any) -> Any:
        return {key: v for key, v in section.items() if key != TARGET} if isinstance(section, Mapping) else section


class ShapedPartOptions(PartOptions):
    shaping: Shaping = ()
    """Steps applied to its scores before they are combined."""


@dataclass(frozen=True)
class RewardPart:
    name: str
    target: str
    kind: type[Reward]
    config: RewardConfig
    options: PartOptions

    @property
    def shaping(self) -> tuple[Step, ...]:
        return self.options.shaping if isinstance(self.options, ShapedPartOptions) else ()

    @property
    def traits(self) -> RewardTraits:
        return self.kind.traits(self.config)

    def section(self) -> dict[str, Any]:
        return {TARGET: self.target, **self.options.model_dump(mode="json"), **self.config.model_dump(mode="json")}


NO_SOURCE = {"use_attribute_docstrings": False}
"""For models created without a source file: pydantic would search every loaded module for each of them."""


def part_model(section: Mapping[str, Any]) -> type[BaseModel]:
    """Return the model of a part's section. Raise PartError."""
    kind, options = _kind(section)
    own = kind.config_model({key: value for key, value in section.items() if key != TARGET})
    return create_model(f"{kind.__name__}Part", __base__=(options, own), __cls_kwargs__=NO_SOURCE)


def read_part(name: str, section: Any) -> RewardPart:
    """Read a part. Raise ValueError: PartError, pydantic's ValidationError, or a plain one."""
    if PART_NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} cannot be a part's name: use letters, digits and _, starting with a letter "
            "(unshaped and ensemble_std are reserved)"
        )
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}: must be a section with {TARGET}, not {section!r}")
    kind, options = _kind(section)
    ours = {key: value for key, value in section.items() if key in options.model_fields}
    own = {key: value for key, value in section.items() if key not in ours and key != TARGET}
    return RewardPart(name, section[TARGET], kind, kind.Config(**own), options(**ours))


def _kind(section: Mapping[str, Any]) -> tuple[type[Reward], type[PartOptions]]:
    from rlkit.config.parts import PartError, import_part

    kind: type[Reward] = import_part("reward", section.get(TARGET))
    options = PartOptions if "shaping" in kind.Config.model_fields else ShapedPartOptions
    clash = sorted(options.model_fields.keys() & kind.Config.model_fields.keys())
    if clash:
        raise PartError(f"cannot be a part: its Config has {' and '.join(clash)}, which every part already has")
    return kind, options


NO_PARTS = "needs at least one part; write reward=[rule,polar], with names of reward options"


class CombinedFields(RewardConfig):
    timeout_seconds: Deadline = 120.0
    """Deadline of one scoring call; by default the sum of the parts' deadlines. When it passes, the worker is replaced
    and the call retried once."""
    combine: Combine = "sum"
    """How the parts' values become one: sum, mean (weighted), product, logical_and (sum of w log sigma(r)); for parts
    that estimate the same quantity: mean, median, min, mean_minus_std, mean_minus_variance; or the dotted path of a
    class, with options as {kind:my_module.MyCombiner,my_option:3}."""
    spread_weight: float = Field(default=1.0, gt=0, le=1000)
    """mean_minus_std and mean_minus_variance: weight of the spread that is subtracted."""
    shaping: Shaping = ()
    """Steps applied to the combined scores, like [{kind:par,reference_value:0}]."""

    @model_validator(mode="before")
    @classmethod
    def _time_for_all_parts(cls, section: Any) -> Any:
        if not isinstance(section, Mapping) or "timeout_seconds" in section:
            return section
        seconds = _seconds(section.get("parts"))
        return section if seconds is None else {**section, "timeout_seconds": seconds}

    @model_validator(mode="after")
    def _spread_acts(self) -> Self:
        if not self.combiner.pessimistic and self.spread_weight != 1.0:
            raise ValueError(f"spread_weight has no effect with combine={self.combiner}")
        return self

    @property
    def combiner(self) -> Combiner:
        return parse_combiner(self.combine)


class CombinedConfig(CombinedFields):
    parts: dict[str, Any] = Field(default={}, validate_default=True)
    """Name and section of each part: `_target_`, its reward's fields, and `weight`, `when`, `shaping`."""

    @field_validator("parts")
    @classmethod
    def _complete(cls, parts: dict[str, Any]) -> dict[str, Any]:
        if not parts:
            raise ValueError(NO_PARTS)
        return {name: _read(name, section).section() for name, section in parts.items()}


def typed_model(section: Mapping[str, Any], plain: type[CombinedConfig]) -> type[BaseModel]:
    """Return `plain` with a typed section for each part.

    A part whose class cannot be used becomes a field that rejects every value; one without `_target_` gets no field.
    """
    parts = section.get("parts")
    if not isinstance(parts, Mapping) or not parts or not all(PART_NAME.fullmatch(str(name)) for name in parts):
        return plain  # its validation says what is wrong
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
    return create_model("Combined", __base__=CombinedFields, __cls_kwargs__=NO_SOURCE, parts=(sections, ...))


def read_parts(config: CombinedConfig) -> tuple[RewardPart, ...]:
    return tuple(read_part(name, section) for name, section in config.parts.items())


def _read(name: str, section: Any) -> RewardPart:
    try:
        return read_part(name, section)
    except ValidationError as error:
        wrong = (f"{name}.{'.'.join(map(str, details['loc']))}: {details['msg']}" for details in error.errors())
        raise ValueError("; ".join(wrong)) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _refusal(message: str) -> Any:
    def refuse(_: Any) -> Any:
        raise ValueError(message)

    return refuse


def _seconds(parts: Any) -> float | None:
    """Return the sum of the parts' deadlines; None if a part is wrong (reported elsewhere)."""
    if isinstance(parts, BaseModel) or not isinstance(parts, Mapping) or not parts:
        return None
    total = 0.0
    for name, section in parts.items():
        try:
            total += read_part(str(name), section).config.timeout_seconds
        except (ValueError, TypeError):
            return None
    return total
