"""The samples of a step, as rows of samples.jsonl."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from rlkit.experience import Group, Message, Sample, Score, Segment, Span, ToolCall
from rlkit.experience.scores import kind_of, total_reward, verdicts
from rlkit.experience.types import BoolArray, FloatArray

Keep = Literal["all", "best_worst"]
Verdicts = Mapping[str, Mapping[str, list[float | None]]]
"""Group id -> `correct` or `verdict` -> the verifier's value for each sample; None: it gave none."""


def chosen_groups(step: int, groups: Sequence[Group], limit: int | None) -> list[int]:
    """Return the indices of at most `limit` groups, in order, drawn at random with the step as seed."""
    places = range(len(groups))
    return list(places) if limit is None or limit >= len(groups) else sorted(random.Random(step).sample(places, limit))


def sample_rows(
    step: int,
    groups: Sequence[Group],
    advantages: Sequence[FloatArray] | None,
    limit: int | None,
    *,
    keep: Keep = "all",
    judged: Verdicts | None = None,
    dropped: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return rows for the samples of `chosen_groups`. `rank` is `best` or `worst` in the group, or `only` or `invalid`
    if at most one sample is valid, else None; `keep=best_worst` keeps only samples with a rank.

    `advantages` has one array [T] per sample, group by group. `dropped`: group id -> why it was not trained. Raises
    ValueError if the number of advantages is not the number of samples.
    """
    first = [0, *accumulate(len(group.samples) for group in groups)]
    if advantages is not None and len(advantages) != first[-1]:
        raise ValueError(f"{len(advantages)} advantages for {first[-1]} samples")
    rows = []
    for g in chosen_groups(step, groups, limit):
        group = groups[g]
        ranks = {i: rank for rank, i in _best_and_worst(group)}
        verdict, reason = (judged or {}).get(group.id, {}), (dropped or {}).get(group.id)
        of_group = _group_row(step, group, reason)
        for i in range(len(group.samples)) if keep == "all" else ranks:
            advantage = None if advantages is None else advantages[first[g] + i]
            said = {name: values[i] for name, values in verdict.items()}
            rows.append({**of_group, "rank": ranks.get(i), **_sample_row(step, group, i, advantage), **said})
    return rows


def verdicts_by_group(judged: Sequence[Group] | None) -> Verdicts:
    """Return the verifier's values by group. Raises RewardFailed if the verifier gives no value."""
    if not judged:
        return {}
    area, values = verdicts(judged)
    name = "correct" if area == "accuracy" else "verdict"
    return {
        group.id: {name: [None if math.isnan(one) else one for one in own.tolist()]}
        for group, own in zip(judged, values, strict=True)
    }


def untrained(groups: Sequence[Group], kept: BoolArray) -> dict[str, str]:
    """Return group id -> why no sample of it is in the loss: `invalid` scores, or the `algorithm` does not use it."""
    reasons, start = {}, 0
    for group in groups:
        end = start + len(group.samples)
        if not kept[start:end].any():
            reasons[group.id] = "algorithm" if all(score.valid for score in _scores(group)) else "invalid"
        start = end
    return reasons


def widest_group(groups: Sequence[Group]) -> Group | None:
    """Return the group whose best and worst responses differ most in reward."""

    def spread(group: Group) -> float:
        rewards = [r for r in map(total_reward, _scores(group)) if r is not None]
        return max(rewards) - min(rewards) if rewards else -1.0

    return max((group for group in groups if group.samples), key=spread, default=None)


def best_and_worst_samples(group: Group) -> list[tuple[str, Sample, Score]]:
    """Return (`best` | `worst` | `only` | `invalid`, sample, score) of the one or two that represent a group."""
    return [(rank, group.samples[i], _scores(group)[i]) for rank, i in _best_and_worst(group)]


def transcript(sample: Sample) -> str:
    """Return the messages of an episode, turn by turn, or the response if there is no episode."""
    if sample.episode is None or not sample.episode.messages:
        return sample.text
    lines: list[str] = []
    for message, _, begun in _messages(sample):
        if begun is not None and (lines or begun.messages):
            lines.append("-- a separate conversation --" if begun.messages else "-- rendered again --")
            lines += [f"{before.role}: {_said(before)}" for before in begun.messages]
        lines.append(f"{message.role}: {_said(message)}")
    return "\n".join(lines)


def _messages(sample: Sample) -> Iterator[tuple[Message, Span | None, Segment | None]]:
    """Yield the messages of an episode; an assistant's turn comes with its span and any segment that it begins."""
    turns = iter(sample.turns)
    starts = {segment.start: segment for segment in sample.segments}
    for message in sample.episode.messages if sample.episode else ():
        turn = next(turns, None) if message.role == "assistant" else None
        yield message, turn, None if turn is None else starts.get(turn.start)


def _said(message: Message) -> str:
    calls = (f"[no call: {call.error}]" if call.error else f"{call.name}({_spelled(call)})" for call in message.calls)
    return " ".join([*([message.content] if message.content else []), *calls])


def _spelled(call: ToolCall) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())


def _episode(sample: Sample) -> dict[str, Any]:
    """Return the episode's turns with their rewards, and how it ended; nothing for a single response.

    `segments`, if there are several: the index of each one's first turn, and the messages that it stands `behind`
    (empty: the prompt, or everything before it, re-rendered)."""
    episode = sample.episode
    if episode is None:
        return {}
    rows: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    for message, turn, begun in _messages(sample):
        if begun is not None:
            behind = [{"role": before.role, "content": _said(before)} for before in begun.messages]
            segments.append({"turn": len(rows), "context_tokens": len(begun.context), "behind": behind})
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            row["name"] = message.name
        if message.calls:
            row["calls"] = [
                {"name": call.name, "arguments": dict(call.arguments), "error": call.error} for call in message.calls
            ]
        if message.role == "assistant":
            data = {} if turn is None else turn.data
            row |= {"reward": None, "state": None, **{k: v for k, v in data.items() if k != "malformed"}}
        rows.append(row)
    several = {"segments": segments} if segments else {}
    return {"turns": rows, **several, "ended": episode.ended, "failure": episode.failure, "success": episode.success}


def _failed(group: Group) -> dict[str, int]:
    return dict(Counter(kind_of(score.reason) for score in _scores(group) if not score.valid))


def _scores(group: Group) -> Sequence[Score]:
    return () if group.scores is None else group.scores.samples


def _best_and_worst(group: Group) -> list[tuple[str, int]]:
    """Return (rank, index). Among equal rewards, the first sample is the best and the last the worst."""
    ranked = [(reward, i) for i, score in enumerate(_scores(group)) if (reward := total_reward(score)) is not None]
    if not ranked:
        unjudged = any(score.valid for score in _scores(group))
        return [("only" if unjudged else "invalid", 0)] if group.samples else []
    if len(ranked) == 1:
        return [("only", ranked[0][1])]
    best = max(ranked, key=lambda pair: (pair[0], -pair[1]))
    worst = min(ranked, key=lambda pair: (pair[0], -pair[1]))
    return [("best", best[1]), ("worst", worst[1])]


def _version_spans(sample: Sample) -> list[tuple[int, int]]:
    """Return (first token, policy version) of each span, in order; observations have no version of their own."""
    first = sample.policy_versions[0]
    if sample.versions is None:
        return [(0, first)]
    own = np.flatnonzero(sample.versions >= 0)
    versions = np.concatenate([[first], sample.versions[own]])
    changed = np.flatnonzero(versions[1:] != versions[:-1])
    return [(0, first), *zip(own[changed].tolist(), versions[changed + 1].tolist(), strict=True)]


def _advantage(sample: Sample, advantage: FloatArray | None) -> float | None:
    if advantage is None or not sample.length:
        return None
    own = advantage if sample.mask is None else advantage[sample.mask]
    return float(own.sum() / len(own))  # `mean` takes three times as long


def _group_row(step: int, group: Group, dropped: str | None) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "step": step,
        "group_id": group.id,
        "prompt_id": prompt.id,
        "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "answer": prompt.answer,
        "references": list(prompt.references),
        "group_size": len(group.samples),
        "group_rewards": [total_reward(score) for score in _scores(group)] or [None] * len(group.samples),
        "failed_in_group": _failed(group),
        "dropped": dropped,
    }


def _sample_row(step: int, group: Group, i: int, advantage: FloatArray | None) -> dict[str, Any]:
    sample = group.samples[i]
    score = group.scores.samples[i] if group.scores is not None else Score.invalid("not scored")
    spans = _version_spans(sample)
    return {
        "sample": sample.index,
        "response": sample.text,
        **_episode(sample),
        "token_ids": sample.token_ids,
        "length": sample.length,
        "reward": total_reward(score),
        "components": dict(score.components),
        "valid": score.valid,
        "reason": score.reason,
        "trace": score.trace,
        "correct": None,
        "verdict": None,
        "advantage": _advantage(sample, advantage),
        "finish_reason": sample.finish_reason,
        "policy_versions": list(sample.policy_versions),
        "version_spans": spans,
        # Updates between the oldest weights that sampled a token and those at the step's start; None if recorded.
        "staleness": None if sample.logprobs is None else step - 1 - min(version for _, version in spans),
    }
