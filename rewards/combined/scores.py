"""Combiners: turn several scores of a response or group into one."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator

from rewards.shaping.references import Float64, log_sigmoid
from rlkit.config.named import read_named
from rlkit.experience import GroupScores, PreferencePair, Score
from rlkit.experience.section import Named
from rlkit.experience.types import FloatArray, SpanReward


class Combiner(Named):
    """Combines several values of one response into one. Subclass it for your own combiner."""

    weighted: ClassVar[bool] = False
    """Whether it uses the weights. Process rewards of several parts, and parts without a value, require this."""
    averages: ClassVar[bool] = False
    """Whether it divides by the sum of the weights (for process rewards, too)."""
    ensemble: ClassVar[bool] = False
    """Whether the parts estimate the same quantity: the score then keeps their values and their spread."""
    pessimistic: ClassVar[bool] = False
    """Whether it uses `reward.spread_weight`."""
    sets_scale: ClassVar[bool] = False
    """Whether it gives raw model scores a known spread."""

    def weight_problem(self, weight: float) -> str | None:
        return None

    @abstractmethod
    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        """values [K], weights [K], K >= 1 -> one value; a value that is not finite makes the sample invalid."""

    def __str__(self) -> str:
        return self.kind


class Sum(Combiner):
    """sum w r."""

    kind: str = "sum"
    weighted: ClassVar[bool] = True

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(values @ weights)


class Mean(Combiner):
    """sum w r / sum w."""

    kind: str = "mean"
    weighted: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    ensemble: ClassVar[bool] = True

    def weight_problem(self, weight: float) -> str | None:
        return None if weight > 0 else "must be above 0"

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(values @ weights / weights.sum())


class Product(Combiner):
    """prod r."""

    kind: str = "product"

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(np.prod(values))


class LogicalAnd(Combiner):
    """sum w log sigma(r) of centred r (arXiv 2402.00742)."""

    kind: str = "logical_and"
    weighted: ClassVar[bool] = True
    sets_scale: ClassVar[bool] = True

    def weight_problem(self, weight: float) -> str | None:
        return None if weight >= 0 else "must be at least 0"

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(log_sigmoid(values) @ weights)


class Median(Combiner):
    """The median of an ensemble (arXiv 2312.09244)."""

    kind: str = "median"
    ensemble: ClassVar[bool] = True

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(np.median(values))


class Minimum(Combiner):
    """The minimum of an ensemble (arXiv 2312.09244)."""

    kind: str = "min"
    ensemble: ClassVar[bool] = True

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(values.min())


class MeanMinusStd(Combiner):
    """mean - spread_weight * std, ddof=0."""

    kind: str = "mean_minus_std"
    ensemble: ClassVar[bool] = True
    pessimistic: ClassVar[bool] = True

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(values.mean() - spread_weight * values.std())


class MeanMinusVariance(Combiner):
    """mean - spread_weight * variance, ddof=0 (arXiv 2312.09244)."""

    kind: str = "mean_minus_variance"
    ensemble: ClassVar[bool] = True
    pessimistic: ClassVar[bool] = True

    def combine(self, values: Float64, weights: Float64, spread_weight: float) -> float:
        return float(values.mean() - spread_weight * values.var())


BUILT_IN = (Sum, Mean, Product, LogicalAnd, Median, Minimum, MeanMinusStd, MeanMinusVariance)
COMBINERS: dict[str, type[Combiner]] = {combiner.model_fields["kind"].default: combiner for combiner in BUILT_IN}


def parse_combiner(value: Any) -> Combiner:
    """Read a combiner by name or section. Raise ValueError."""
    return read_named(value, COMBINERS, Combiner, "combiner")  # type: ignore[type-abstract]


def _spelled_out(value: Any) -> str | dict[str, Any]:
    combiner = parse_combiner(value)
    fields = combiner.model_dump(mode="json")
    return fields if len(fields) > 1 else combiner.kind


Combine = Annotated[str | dict[str, Any], BeforeValidator(_spelled_out)]
"""With all options; only the kind if there are none."""


@dataclass(frozen=True)
class Rule:
    combiner: Combiner
    spread_weight: float = 1.0

    def __call__(self, values: Float64, weights: Float64) -> float:
        """values [K], weights [K] -> one value. Raise ValueError for K = 0."""
        if len(values) == 0:
            raise ValueError("there is nothing to combine")
        with np.errstate(over="ignore"):  # the caller refuses values that are not finite
            return float(self.combiner.combine(values, weights, self.spread_weight))


def summed_tokens(scores: Sequence[Score], weights: Sequence[float]) -> FloatArray | None:
    """Return sum w r_t [T] over the scores that have token rewards."""
    weighted = [
        weight * score.token_rewards.astype(np.float64)
        for score, weight in zip(scores, weights, strict=True)
        if score.token_rewards is not None
    ]
    return np.sum(weighted, axis=0).astype(np.float32) if weighted else None


def summed_spans(scores: Sequence[Score], weights: Sequence[float]) -> tuple[SpanReward, ...]:
    """Sum w r over equal spans; return all spans in order of their ends."""
    values: defaultdict[tuple[int, int], float] = defaultdict(float)
    for score, weight in zip(scores, weights, strict=True):
        for span in score.span_rewards:
            values[span.end, span.start] += weight * span.value
    return tuple(SpanReward(start, end, value) for (end, start), value in sorted(values.items()))


def averaged_pairs(
    pairs_by_reward: Sequence[Sequence[PreferencePair]], weights: Sequence[float]
) -> tuple[PreferencePair, ...]:
    """Return for each compared pair the mean probability, weighted by |weight|, with the winner first.

    A negative weight counts for the other sample; weight 0 does not count.
    """
    votes: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for pairs, weight in zip(pairs_by_reward, weights, strict=True):
        for pair in pairs if weight else ():
            forward = (pair.winner < pair.loser) == (weight > 0)
            probability = pair.probability if forward else 1.0 - pair.probability
            votes[min(pair.winner, pair.loser), max(pair.winner, pair.loser)].append((abs(weight), probability))
    averaged = []
    for (left, right), weighed in sorted(votes.items()):
        total = sum(weight for weight, _ in weighed)
        probability = sum(weight * p for weight, p in weighed) / total
        winner, loser = (left, right) if probability >= 0.5 else (right, left)
        averaged.append(PreferencePair(winner, loser, max(probability, 1.0 - probability)))
    return tuple(averaged)


@dataclass(frozen=True)
class PartScores:
    name: str
    weight: float
    raw: GroupScores
    shaped: GroupScores
    show_shaped: bool


def combined_group(samples: int, parts: Sequence[PartScores], rule: Rule) -> GroupScores:
    scores = tuple(_combined(i, parts, rule) for i in range(samples))
    valid = {i for i, score in enumerate(scores) if score.valid}
    pairs = averaged_pairs(
        [[p for p in part.shaped.pairs if {p.winner, p.loser} <= valid] for part in parts],
        [part.weight for part in parts],
    )
    return GroupScores(scores, pairs)


def named_reason(reason: str, name: str) -> str:
    """Insert a name into a reason after its class: `timeout: no answer` -> `timeout: part judge: no answer`."""
    kind, _, details = reason.partition(":")
    return f"{kind.strip()}: {name}: {details.strip()}" if details.strip() else f"{kind.strip()}: {name}"


def _combined(i: int, parts: Sequence[PartScores], rule: Rule) -> Score:
    trace = "\n".join(f"{part.name}: {text}" for part in parts if (text := part.shaped.samples[i].trace))
    if not parts:
        return Score.invalid("unrouted: no part of the reward judges this prompt (reward.parts.NAME.when)")
    failed = [part for part in parts if not part.shaped.samples[i].valid]
    if failed:
        first, *others = failed
        reason = first.shaped.samples[i].reason
        if not first.raw.samples[i].valid:  # a reason from the part's shaping already names the part
            reason = named_reason(reason, f"part {first.name}")
        return Score.invalid(
            "; ".join([reason, *(f"part {o.name}: {o.shaped.samples[i].reason}" for o in others)]), trace
        )
    return _valid(i, parts, rule, trace)


def _valid(i: int, parts: Sequence[PartScores], rule: Rule, trace: str) -> Score:
    combiner = rule.combiner
    scores = [part.shaped.samples[i] for part in parts]
    weights = [part.weight for part in parts]
    valued = [(score.value, weight) for score, weight in zip(scores, weights, strict=True) if score.value is not None]
    silent = [part.name for part, score in zip(parts, scores, strict=True) if score.value is None]
    if silent and not combiner.weighted:
        return Score.invalid(
            f"no_value: part {silent[0]}: it gave process rewards only; {combiner} needs values", trace
        )
    components = _components(i, parts)
    value = None
    ensemble: tuple[float, ...] = scores[0].ensemble if len(scores) == 1 else ()
    if valued:
        values = np.array([value for value, _ in valued], dtype=np.float64)
        value = rule(values, np.array([w for _, w in valued]))
        if combiner.ensemble:
            ensemble = tuple(values.tolist())
            components["ensemble_std"] = float(values.std())
    process = (np.array(weights) / (sum(weights) if combiner.averages else 1.0)).tolist()
    tokens, spans = summed_tokens(scores, process), summed_spans(scores, process)
    numbers = [*components.values(), *(span.value for span in spans), *(() if value is None else (value,))]
    if not np.isfinite(numbers).all() or (tokens is not None and not np.isfinite(tokens).all()):
        return Score.invalid(f"not_finite: combine={combiner} of {components} is not finite", trace)
    return Score(value, tokens, spans, components, ensemble, trace=trace)


def _components(i: int, parts: Sequence[PartScores]) -> dict[str, float]:
    components: dict[str, float] = {}
    for part in parts:
        raw, shaped = part.raw.samples[i], part.shaped.samples[i]
        if raw.value is not None:
            components[part.name] = raw.value
        components |= {f"{part.name}/{name}": value for name, value in raw.components.items()}
        if part.show_shaped and shaped.value is not None:  # last, to replace an earlier one in scores read back
            components[f"{part.name}/shaped"] = shaped.value
    return components


def part_scores(scores: GroupScores, name: str, alone: bool = False) -> GroupScores:
    """Read a part's scores back from combined ones, with its ensemble's members only if it `alone` judged the prompt.

    A part without a value gets the combined process rewards. Invalid scores stay invalid.
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
    """Return new values with the earlier process rewards, preferences and traces; invalid scores stay invalid."""
    samples = []
    for new, old in zip(scores.samples, earlier.samples, strict=True):
        process = {"token_rewards": old.token_rewards, "span_rewards": old.span_rewards, "trace": old.trace}
        kept = replace(new, **process) if new.valid else new  # type: ignore[arg-type]
        samples.append(kept if old.valid else old)
    return GroupScores(tuple(samples), earlier.pairs)
