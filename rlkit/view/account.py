"""Which component of a combined reward brought how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlkit.view.rows import number
from rlkit.view.schema import Part

ADDED_UP = 1e-3
"""Relative: rewards are rounded in no run, components neither."""


def account(
    components: Mapping[str, float | None], reward: float | None, options: Mapping[str, Any]
) -> tuple[list[Part], str]:
    """A sample's parts, and in words whether they add up; `options` is the section `reward` of the configuration.

    A part of a sum brings weight x value, of a mean divided by the sum of the weights; a shaped part counts as shaped.
    """
    weights = part_weights(options)
    rule = _combine(options)
    if not weights:
        return [Part(name=name, value=value, weight=None, contribution=None) for name, value in components.items()], (
            "one reward: its components say more about it and need not add up" if components else "no components"
        )
    valued = {name: value for name in weights if (value := _counted(components, name)) is not None}
    whole = sum(weights[name] for name in valued) if rule == "mean" else 1.0
    parts = [
        Part(
            name=name,
            value=components.get(name),
            weight=weights[name],
            contribution=weights[name] * value / whole if rule in ("sum", "mean") and whole else None,
        )
        for name, value in valued.items()
    ]
    parts += [
        Part(name=name, value=value, weight=None, contribution=None)
        for name, value in components.items()
        if name not in valued
    ]
    return parts, _words(parts, reward, components, rule)


def _words(parts: list[Part], reward: float | None, components: Mapping[str, float | None], rule: str) -> str:
    if rule not in ("sum", "mean"):
        return f"combined by {rule}: the parts do not add up"
    total = sum(part.contribution for part in parts if part.contribution is not None)
    target = components.get("unshaped", reward)
    if reward is None or target is None:
        return "the sample has no reward"
    if not math.isclose(total, target, rel_tol=ADDED_UP, abs_tol=ADDED_UP):
        return f"the parts come to {total:.4g}, the reward is {target:.4g}: another step changed it"
    shaped = f", which shaping made {reward:.4g}" if "unshaped" in components else ""
    return f"the parts add up to {target:.4g}{shaped}"


def part_weights(options: Mapping[str, Any]) -> dict[str, float]:
    """Of a combined reward; empty for any other."""
    parts = options.get("parts")
    if not isinstance(parts, Mapping):
        return {}
    found = {str(name): number(part.get("weight", 1.0)) for name, part in parts.items() if isinstance(part, Mapping)}
    return {name: 1.0 if weight is None else weight for name, weight in found.items()}


def _counted(components: Mapping[str, float | None], name: str) -> float | None:
    return components.get(f"{name}/shaped", components.get(name))


def _combine(options: Mapping[str, Any]) -> str:
    rule = options.get("combine", "sum")
    return str(rule.get("kind", "sum") if isinstance(rule, Mapping) else rule)
