"""What about a combination does not fit together; the messages name the key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rewards.base import TrainableReward, UpdateWhen
from rewards.combined.aggregate import WEIGHTED
from rewards.combined.config import CombinedConfig
from rewards.combined.sections import Part
from rewards.shaping.steps import Lsc, ProcessStep, ReferenceStep, Step


def moments(parts: Sequence[Part]) -> dict[str, UpdateWhen]:
    """The parts that learn, and when."""
    found: dict[str, UpdateWhen] = {
        part.name: part.kind.update_when(part.config) for part in parts if issubclass(part.kind, TrainableReward)
    }
    return {name: when for name, when in found.items() if when != "none"}


def misfits(config: CombinedConfig, parts: Sequence[Part]) -> Iterator[str]:
    """What does not fit together, as messages that name the key."""
    combine = config.combine
    for part in parts:
        key = f"reward.parts.{part.name}"
        weight = part.options.weight
        if weight != 1.0 and combine not in WEIGHTED:
            yield f"{key}.weight={weight:g}: has no effect with combine={combine}"
        if (combine == "mean" and weight <= 0) or (combine == "logical_and" and weight < 0):
            bound = "above 0" if combine == "mean" else "at least 0"
            yield f"{key}.weight={weight:g}: must be {bound} with combine={combine}"
        if combine == "logical_and" and any(isinstance(step, Lsc) for step in part.shaping):
            yield f"{key}.shaping: lsc takes the log-sigmoid that combine=logical_and takes again; use combine=sum"
        for name in ("workers", "max_failed_share"):
            if getattr(part.config, name) != type(part.config).model_fields[name].default:
                yield f"{key}.{name}={getattr(part.config, name)}: has no effect in a part; set reward.{name}"
        yield from _unfit_steps(f"{key}.shaping", part.shaping, [part])
    yield from _unfit_steps("reward.shaping", config.shaping, parts)
    yield from _unfit_times(config, parts)
    given = [part.name for part in parts if part.kind.gives_process_rewards(part.config)]
    if len(given) > 1 and combine not in WEIGHTED:
        yield (
            f"reward.combine={combine}: {' and '.join(given)} give process rewards, which can only be summed; use sum, "
            "logical_and or mean"
        )
    when = moments(parts)
    if len(set(when.values())) > 1:
        each = ", ".join(f"{name} {moment}" for name, moment in when.items())
        yield f"reward.parts: rewards that learn must do so at one moment of a step, before or after ({each})"


def _unfit_steps(key: str, steps: Sequence[Step], parts: Sequence[Part]) -> Iterator[str]:
    process = [part for part in parts if part.kind.gives_process_rewards(part.config)]
    learning = moments(parts)
    for step in steps:
        if isinstance(step, ProcessStep) and not process:
            yield f"{key}: {step.name} shapes process rewards, and {' and '.join(p.name for p in parts)} gives none"
        blind = [part for part in parts if not part.kind.judges_texts(part.config)]
        if isinstance(step, ReferenceStep) and step.reference_responses and (process or learning or blind):
            names = dict.fromkeys([*(part.name for part in (*process, *blind)), *learning])
            yield (
                f"{key}: {step.name} scores reference_responses once and by their text, which {' and '.join(names)} "
                "cannot; use reference_rewards or reference_value"
            )


def _unfit_times(config: CombinedConfig, parts: Sequence[Part]) -> Iterator[str]:
    needed = sum(part.config.timeout_seconds for part in parts)
    if needed > config.timeout_seconds * (1 + 1e-9):
        each = ", ".join(f"{part.name} {part.config.timeout_seconds:g}" for part in parts)
        yield (
            f"reward.timeout_seconds={config.timeout_seconds:g}: the parts score one after the other and may take "
            f"{needed:g} s ({each}); set at least that, or lower reward.parts.NAME.timeout_seconds"
        )


def placed(message: str, part: Part) -> str:
    """A part's own message, with the keys it names where the user finds them (`reward.x` -> `reward.parts.NAME.x`)."""
    own = "|".join(sorted(map(re.escape, part.kind.Config.model_fields), key=len, reverse=True))
    key = f"reward.parts.{part.name}"
    moved = re.sub(rf"\breward\.(?=(?:{own})\b)", f"{key}.", message)
    return moved if moved.startswith(key) else f"{key}: {moved}"
