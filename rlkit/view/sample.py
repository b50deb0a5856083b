"""One sample: its group, its tokens, and the contribution of each component of a combined reward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from rlkit.view import schema, tokens
from rlkit.view.rows import listed, number, said
from rlkit.view.runs import NotThereError, Run
from rlkit.view.samples import summaries

ADDED_UP = 1e-3
"""Relative tolerance: neither rewards nor components are rounded in a run."""
ADDING = ("sum", "mean")
"""Rules under which a reward is the sum of its parts' contributions."""


class SampleAsked(schema.AboutRun):
    id: schema.Whole


def sample(run: Run, asked: SampleAsked) -> schema.SampleResult:
    row, summary = run.index.raw(asked.id), _summary(run, asked.id)
    if row is None:
        raise _gone(run, asked.id)
    recorded = _tokens(run, summary) if summary.has_tokens else None
    about_tokens = None
    if recorded:
        about_tokens = schema.TokensAbout(signals=tokens.signals_of(recorded), length=len(recorded["token_id"]))
    parts, note = account(summary.components, summary.reward, run.option("reward", {}) or {})
    members = _members(run, summary, row)
    kept = sorted({asked.id, *(member.id for member in members if member.id is not None)})
    at = kept.index(asked.id)
    # The neighbours are those in the group; at its ends, those in the file.
    ((before, after),) = run.index.all(
        "SELECT (SELECT max(id) FROM rows WHERE id < ?), (SELECT min(id) FROM rows WHERE id > ?)", kept[0], kept[-1]
    )
    return schema.SampleResult(
        row={**row, "id": asked.id},
        summary=summary,
        group=members,
        tokens=about_tokens,
        account=parts,
        account_note=note,
        previous=kept[at - 1] if at > 0 else before,
        next=kept[at + 1] if at < len(kept) - 1 else after,
    )


def _summary(run: Run, row: int) -> schema.SampleSummary:
    found = summaries(run, [row])
    if not found:
        raise _gone(run, row)
    return found[0]


def _gone(run: Run, row: int) -> NotThereError:
    return NotThereError(f"run {run.id!r} has no sample {row} (any more)")


def _tokens(run: Run, summary: schema.SampleSummary) -> dict[str, Any] | None:
    return tokens.token_row(run.path, tokens.Place(summary.step, summary.group_id, summary.sample))


def _members(run: Run, summary: schema.SampleSummary, row: dict[str, Any]) -> list[schema.GroupMember]:
    kept = _kept(run, summary.step, summary.group_id, summary.kind)
    rewards = dict(enumerate(map(number, listed(row.get("group_rewards")))))
    members = []
    for i in sorted(kept.keys() | rewards.keys()):
        id_, reward, rank = kept.get(i, (None, None, None))
        members.append(
            schema.GroupMember(id=id_, sample=i, reward=rewards.get(i) if reward is None else reward, rank=rank)
        )
    return members


def _kept(run: Run, step: int, group: str, kind: str) -> dict[int, tuple[int, float | None, str | None]]:
    """Return sample -> (id, reward, rank) for the rows of a group."""
    query = "SELECT sample, id, reward, rank FROM rows WHERE step = ? AND group_id = ? AND kind = ? ORDER BY sample, id"
    return {sample_: more for sample_, *more in run.index.all(query, step, group, kind)}


class GroupAsked(schema.AboutRun):
    step: schema.Whole
    group: str


def group(run: Run, asked: GroupAsked) -> schema.GroupResult:
    """Return a group; if it was recorded both in training and in an evaluation, the training rows."""
    kept = _kept(run, asked.step, asked.group, "training") or _kept(run, asked.step, asked.group, "evaluation")
    rows = [{**row, "id": id_} for id_, _, _ in kept.values() if (row := run.index.raw(id_)) is not None]
    if not rows:
        raise NotThereError(f"run {run.id!r} has no group {asked.group!r} in step {asked.step}")
    first = rows[0]
    rewards = [number(reward) for reward in listed(first.get("group_rewards"))]
    rewards = rewards or [kept[i][1] if i in kept else None for i in range(max(kept) + 1)]
    known = [reward for reward in rewards if reward is not None]
    prompt = first.get("prompt")
    return schema.GroupResult(
        group_id=asked.group,
        step=asked.step,
        prompt=prompt if isinstance(prompt, list) else [{"role": "user", "content": said(prompt)}],
        answer=first.get("answer"),
        references=[str(reference) for reference in first.get("references") or ()],
        rewards=rewards,
        rows=rows,
        equal=len(known) > 1 and min(known) == max(known),
        dropped=first.get("dropped"),
    )


class TokensAsked(SampleAsked):
    signals: str = ""
    """Names of signals, separated by commas; empty: all."""
    from_: schema.Whole = Field(default=0, alias="from")
    to: schema.Whole | None = None


def tokens_of(run: Run, asked: TokensAsked) -> schema.TokensResult:
    row = _tokens(run, _summary(run, asked.id))
    if row is None:
        raise NotThereError(
            f"no token signals for sample {asked.id}: a run keeps them for tracking.token_groups_per_step groups a step"
        )
    chosen = [name for name in asked.signals.split(",") if name] or None
    return tokens.tokens_result(row, chosen, asked.from_, asked.to)


def account(
    components: Mapping[str, float | None], reward: float | None, options: Mapping[str, Any]
) -> tuple[list[schema.Part], str]:
    """Return a sample's parts, and a note on whether they add up. `options`: the section `reward` of the configuration.

    A part contributes weight x value, in a mean divided by the sum of the weights; a shaped part counts as shaped.
    """
    weights = part_weights(options)
    rule = rule_of(options)
    counted = {name: components.get(f"{name}/shaped", components.get(name)) for name in weights}
    valued = {name: value for name, value in counted.items() if value is not None}
    whole = sum(weights[name] for name in valued) if rule == "mean" else 1.0
    adds_up = rule in ADDING and whole != 0
    brought = {name: weights[name] * value / whole for name, value in valued.items() if adds_up}
    parts = [
        schema.Part(name=name, value=components.get(name), weight=weights.get(name), contribution=brought.get(name))
        for name in (*valued, *(name for name in components if name not in valued))
    ]
    return parts, _account_note(components, reward, rule, sum(brought.values())) if weights else (
        "a single reward: its components explain it and need not add up" if components else "no components"
    )


def rule_of(options: Mapping[str, Any]) -> str:
    """Return the rule that combines the parts of the section `reward`."""
    rule = options.get("combine", "sum")
    return str(rule.get("kind", "sum") if isinstance(rule, Mapping) else rule)


def _account_note(components: Mapping[str, float | None], reward: float | None, rule: str, total: float) -> str:
    target = components.get("unshaped", reward)
    if rule not in ADDING:
        return f"combined by {rule}: the parts do not add up"
    if reward is None or target is None:
        return "the sample has no reward"
    if not math.isclose(total, target, rel_tol=ADDED_UP, abs_tol=ADDED_UP):
        return f"the parts come to {total:.4g}, the reward is {target:.4g}: another step changed it"
    return f"the parts add up to {target:.4g}" + (
        f", which shaping turned into {reward:.4g}" if "unshaped" in components else ""
    )


def part_weights(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the weights of a combined reward's parts; empty for any other reward."""
    parts = options.get("parts")
    if not isinstance(parts, Mapping):
        return {}
    found = {str(name): number(part.get("weight", 1.0)) for name, part in parts.items() if isinstance(part, Mapping)}
    return {name: 1.0 if weight is None else weight for name, weight in found.items()}
