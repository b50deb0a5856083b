"""From the values of several rewards for one response to one. Pure functions in float64; no rewards: ValueError.

Process rewards and preferences of several rewards as one.

One score for one response, or one group, from those of several rewards. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rewards.shaping.references import Float64, log_sigmoid
from rlkit.experience import GroupScores, PreferencePair, Score
from rlkit.experience.types import FloatArray, SpanReward

Combine = Literal["sum", "product", "logical_and", "mean", "median", "min", "mean_minus_std", "mean_minus_variance"]
WEIGHTED: frozenset[Combine] = frozenset({"sum", "logical_and", "mean"})
"""Where weights mean something."""
ENSEMBLES: frozenset[Combine] = frozenset({"mean", "median", "min", "mean_minus_std", "mean_minus_variance"})
"""Where the parts are members that estimate the same (arXiv 2312.09244)."""
PESSIMISTIC: frozenset[Combine] = frozenset({"mean_minus_std", "mean_minus_variance"})
"""Where `spread_weight` means something."""


def aggregate(combine: Combine, values: Float64, weights: Float64, spread_weight: float = 1.0) -> float:
    """One number from values [K] and weights [K].

    sum: sum w r. product: prod r. logical_and: sum w log sigma(r) (arXiv 2402.00742, r being centred). mean:
    sum w r / sum w. mean_minus_std, mean_minus_variance: mean - spread_weight * std or variance (ddof=0).
    """
    if len(values) == 0:
        raise ValueError("there is nothing to combine")
    match combine:
        case "sum":
            return float(values @ weights)
        case "product":
            with np.errstate(over="ignore"):  # the caller refuses what is not finite
                return float(np.prod(values))
        case "logical_and":
            return float(log_sigmoid(values) @ weights)
        case "mean":
            return float(values @ weights / weights.sum())
        case "median":
            return float(np.median(values))
        case "min":
            return float(values.min())
        case "mean_minus_std":
            return float(values.mean() - spread_weight * values.std())
        case "mean_minus_variance":
            return float(values.mean() - spread_weight * values.var())


def summed_tokens(scores: Sequence[Score], weights: Sequence[float]) -> FloatArray | None:
    """sum w r_t [T] over the scores that have token rewards; None if none has."""
    found = [
        weight * score.token_rewards.astype(np.float64)
        for score, weight in zip(scores, weights, strict=True)
        if score.token_rewards is not None
    ]
    return np.sum(found, axis=0).astype(np.float32) if found else None


def summed_spans(scores: Sequence[Score], weights: Sequence[float]) -> tuple[SpanReward, ...]:
    """sum w r over equal spans; others stand side by side, in the order of their ends."""
    values: defaultdict[tuple[int, int], float] = defaultdict(float)
    for score, weight in zip(scores, weights, strict=True):
        for span in score.span_rewards:
            values[span.end, span.start] += weight * span.value
    return tuple(SpanReward(start, end, value) for (end, start), value in sorted(values.items()))


def averaged_pairs(
    opinions: Sequence[Sequence[PreferencePair]], weights: Sequence[float]
) -> tuple[PreferencePair, ...]:
    """For every two samples compared by anyone: the |weight|-weighted mean of the probability, winner named first.

    A reward with a negative weight counts for the other sample; one with weight 0 has no say.
    """
    votes: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for pairs, weight in zip(opinions, weights, strict=True):
        for pair in pairs if weight else ():
            forward = (pair.winner < pair.loser) == (weight > 0)
            probability = pair.probability if forward else 1.0 - pair.probability
            votes[min(pair.winner, pair.loser), max(pair.winner, pair.loser)].append((abs(weight), probability))
    made = []
    for (left, right), found in sorted(votes.items()):
        total = sum(weight for weight, _ in found)
        probability = sum(weight * p for weight, p in found) / total
        winner, loser = (left, right) if probability >= 0.5 else (right, left)
        made.append(PreferencePair(winner, loser, max(probability, 1.0 - probability)))
    return tuple(made)


@dataclass(frozen=True)
class Rule:
    """How parts become one."""

    combine: Combine
    spread_weight: float


@dataclass(frozen=True)
class Opinion:
    """What one part says about a group."""

    name: str
    weight: float
    raw: GroupScores
    """As it was given, for the components."""
    shaped: GroupScores
    """After its own shaping, for the combination."""
    show_shaped: bool
    """Whether the shaped value is a component of its own."""


def combined_group(samples: int, opinions: Sequence[Opinion], rule: Rule) -> GroupScores:
    """The scores of a group of so many samples."""
    made = tuple(_combined(i, opinions, rule) for i in range(samples))
    valid = {i for i, score in enumerate(made) if score.valid}
    pairs = averaged_pairs(
        [[p for p in each.shaped.pairs if {p.winner, p.loser} <= valid] for each in opinions],
        [each.weight for each in opinions],
    )
    return GroupScores(made, pairs)


def named_reason(reason: str, place: str) -> str:
    """`timeout: no answer` -> `timeout: part judge: no answer`: the class stays first."""
    kind, _, details = reason.partition(":")
    return f"{kind.strip()}: {place}: {details.strip()}" if details.strip() else f"{kind.strip()}: {place}"


def _combined(i: int, opinions: Sequence[Opinion], rule: Rule) -> Score:
    trace = "\n".join(f"{each.name}: {text}" for each in opinions if (text := each.shaped.samples[i].trace))
    if not opinions:
        return Score.invalid("unrouted: no part of the reward judges this prompt (reward.parts.NAME.when)")
    failed = [each for each in opinions if not each.shaped.samples[i].valid]
    if failed:
        first, *others = failed
        # What a part's shaping finds wrong names the part already.
        known = first.raw.samples[i].valid
        reason = first.shaped.samples[i].reason
        reason = reason if known else named_reason(reason, f"part {first.name}")
        return Score.invalid(
            "; ".join([reason, *(f"part {o.name}: {o.shaped.samples[i].reason}" for o in others)]), trace
        )
    return _valid(i, opinions, rule, trace)


def _valid(i: int, opinions: Sequence[Opinion], rule: Rule, trace: str) -> Score:
    scores = [each.shaped.samples[i] for each in opinions]
    weights = [each.weight for each in opinions]
    valued = [(score.value, weight) for score, weight in zip(scores, weights, strict=True) if score.value is not None]
    silent = [each.name for each, score in zip(opinions, scores, strict=True) if score.value is None]
    if silent and rule.combine not in ("sum", "mean", "logical_and"):
        return Score.invalid(
            f"no_value: part {silent[0]}: it gave process rewards only; {rule.combine} needs values", trace
        )
    components = _components(i, opinions)
    value = None
    ensemble: tuple[float, ...] = scores[0].ensemble if len(scores) == 1 else ()
    if valued:
        values = np.array([value for value, _ in valued], dtype=np.float64)
        value = aggregate(rule.combine, values, np.array([w for _, w in valued]), rule.spread_weight)
        if rule.combine in ENSEMBLES:
            ensemble = tuple(values.tolist())
            components["ensemble_std"] = float(values.std())
    process = np.array(weights) / (sum(weights) if rule.combine == "mean" else 1.0)
    tokens, spans = summed_tokens(scores, process.tolist()), summed_spans(scores, process.tolist())
    parts = [*components.values(), *(span.value for span in spans), *(() if value is None else (value,))]
    if not np.isfinite(parts).all() or (tokens is not None and not np.isfinite(tokens).all()):
        return Score.invalid(f"not_finite: combine={rule.combine} of {components} is not finite", trace)
    return Score(value, tokens, spans, components, ensemble, trace=trace)


def _components(i: int, opinions: Sequence[Opinion]) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in opinions:
        raw, shaped = each.raw.samples[i], each.shaped.samples[i]
        if raw.value is not None:
            found[each.name] = raw.value
        found |= {f"{each.name}/{name}": value for name, value in raw.components.items()}
        if each.show_shaped and shaped.value is not None:  # last: scores that were read back hold an earlier one
            found[f"{each.name}/shaped"] = shaped.value
    return found


def part_scores(scores: GroupScores, name: str, alone: bool = False) -> GroupScores:
    """What part `name` had said, read back from combined scores: its value, its components, and, where no other part
    judged the prompt (`alone`), its ensemble's members.

    Where it had no value, the combined process rewards stand for its own. Invalid stays invalid.
    """
    return GroupScores(tuple(_part_score(score, name, alone) for score in scores.samples), scores.pairs)


def _part_score(score: Score, name: str, alone: bool) -> Score:
    if not score.valid:
        return Score.invalid(score.reason, score.trace)
    prefix = f"{name}/"
    own = {key.removeprefix(prefix): value for key, value in score.components.items() if key.startswith(prefix)}
    read = replace(score, value=score.components.get(name), components=own, ensemble=score.ensemble if alone else ())
    return read if read.value is None else replace(read, token_rewards=None, span_rewards=())


def with_process_of(scores: GroupScores, earlier: GroupScores) -> GroupScores:
    """These values with the process rewards, preferences and traces of earlier scores; invalid ones stay so."""
    made = []
    for new, old in zip(scores.samples, earlier.samples, strict=True):
        kept = new.valid and old.valid
        process = {"token_rewards": old.token_rewards, "span_rewards": old.span_rewards, "trace": old.trace}
        made.append(replace(new, **process) if kept else (new if old.valid else old))  # type: ignore[arg-type]
    return GroupScores(tuple(made), earlier.pairs)
