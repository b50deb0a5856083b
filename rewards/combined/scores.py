"""One score for one response, or one group, from those of several rewards. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewards.combined.aggregate import ENSEMBLES, Combine, aggregate
from rewards.combined.process import averaged_pairs, summed_spans, summed_tokens
from rlkit.experience import GroupScores, Score


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
