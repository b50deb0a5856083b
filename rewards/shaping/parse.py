"""A `shaping` list as a user writes it: `[delta, {kind: clip, eta: 0.5}]`, with messages that name the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from rewards.shaping.steps import KINDS, ReferenceStep, Step


def parse_steps(value: Any) -> Any:
    """Steps from names and mappings; steps stay as they are. Raises ValueError that says which step is wrong, and how.

    A step that compares with reference rewards sees the raw scale, so only costs of length may precede it.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError("must be a list of steps, like [{kind:par,reference_value:0}]")
    steps = [_step(number, each) for number, each in enumerate(value, start=1)]
    for number, step in enumerate(steps, start=1):
        before = next((s for s in steps[: number - 1] if s.level == "outcome" and not s.keeps_scale), None)
        if isinstance(step, ReferenceStep) and before is not None:
            raise ValueError(
                f"step {number} ({step.name}) compares with reference rewards, which {before.name} before it would not "
                f"have changed; put {step.name} first (only length_penalty and overlong may precede it)"
            )
    return tuple(steps)


Shaping = Annotated[tuple[SerializeAsAny[Step], ...], BeforeValidator(parse_steps)]


def _step(number: int, value: Any) -> Step:
    from rlkit.config.messages import did_you_mean, unsuitable_scalars

    if isinstance(value, Step):
        return value
    fields = {"kind": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        raise ValueError(f"step {number} must be a name or a mapping with a kind, not {value!r}")
    kind = fields.get("kind")
    if kind is None:
        raise ValueError(f"step {number} has no kind; available: {', '.join(sorted(KINDS))}")
    if kind not in KINDS:
        raise ValueError(f"step {number}: there is no kind {kind!r}; {did_you_mean(str(kind), KINDS)}")
    unsuitable = dict(unsuitable_scalars(KINDS[kind], fields))
    if unsuitable:
        raise ValueError("; ".join(f"step {number} ({kind}): {name} {text}" for name, text in unsuitable.items()))
    try:
        return KINDS[kind].model_validate(dict(fields))
    except ValidationError as error:
        raise ValueError("; ".join(_wrong(number, KINDS[kind], details) for details in error.errors())) from error


def _wrong(number: int, kind: type[Step], details: Any) -> str:
    from rlkit.config.messages import allowed, did_you_mean

    place = f"step {number} ({kind.model_fields['kind'].default})"
    if details["type"] == "value_error":
        return f"{place} {details['ctx']['error']}"
    name = str(details["loc"][0])
    info = kind.model_fields.get(name)
    if details["type"] == "missing" or info is None:
        others = [field for field in kind.model_fields if field != "kind"]
        what = "is needed" if info is not None else f"is no option of it; {did_you_mean(name, others)}"
        return f"{place}: {name} {what}"
    return f"{place}: {name}={details['input']} must be {allowed(info)}"
