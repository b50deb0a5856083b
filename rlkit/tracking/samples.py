"""The best and the worst response of every group, as rows of samples.jsonl."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlkit.experience import Group, Message, Sample, Score, Segment, Span, ToolCall
from rlkit.experience.scores import kind_of, total_reward
from rlkit.experience.types import FloatArray


def sample_rows(
    step: int, groups: Sequence[Group], advantages: Sequence[FloatArray] | None, limit: int | None
) -> list[dict[str, Any]]:
    """Two rows per group (`rank` is best or worst), or one (`only`, `invalid`) where at most one is valid.

    `advantages` has one array [T] per sample, group by group. With a `limit`, that many groups chosen at random.
    Raises ValueError if the number of advantages is not the number of samples.
    """
    samples = sum(len(group.samples) for group in groups)
    if advantages is not None and len(advantages) != samples:
        raise ValueError(f"{len(advantages)} advantages for {samples} samples")
    chosen: Sequence[int] = range(len(groups))
    if limit is not None and limit < len(groups):
        chosen = sorted(random.Random(step).sample(chosen, limit))
    first = [0, *np.cumsum([len(group.samples) for group in groups]).tolist()]
    rows = []
    for g in chosen:
        group = groups[g]
        for rank, i in _best_and_worst(group):
            advantage = None if advantages is None else advantages[first[g] + i]
            rows.append(_row(step, group, i, rank, advantage))
    return rows


def widest_group(groups: Sequence[Group]) -> Group | None:
    """The group whose best and worst response differ most in reward."""

    def spread(group: Group) -> float:
        rewards = [r for r in map(total_reward, _scores(group)) if r is not None]
        return max(rewards) - min(rewards) if rewards else -1.0

    return max((group for group in groups if group.samples), key=spread, default=None)


def best_and_worst_samples(group: Group) -> list[tuple[str, Sample, Score]]:
    """(`best` | `worst` | `only` | `invalid`, sample, score) of the one or two responses that represent a group."""
    return [(rank, group.samples[i], _scores(group)[i]) for rank, i in _best_and_worst(group)]


def transcript(sample: Sample) -> str:
    """What was said in an episode, turn by turn; else the response."""
    if sample.episode is None or not sample.episode.messages:
        return sample.text
    lines: list[str] = []
    for message, _, begun in _messages(sample):
        if begun is not None and (lines or begun.messages):
            lines.append("-- a conversation of its own --" if begun.messages else "-- rendered anew --")
            lines += [f"{before.role}: {_said(before)}" for before in begun.messages]
        lines.append(f"{message.role}: {_said(message)}")
    return "\n".join(lines)


def _messages(sample: Sample) -> Iterator[tuple[Message, Span | None, Segment | None]]:
    """What was said in an episode, an assistant's turn with its span, and with the segment that it begins."""
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
    """Its turns with what each earned, and how it ended; nothing of a single response.

    `segments`: of several, the place of their first turn, and what it stands `behind` (nothing: the prompt, or all
    before it, rendered anew)."""
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
    """Of equal rewards, the first sample is the best and the last the worst."""
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
    """(first token, policy version), in order; observations have none of their own."""
    spans = [(0, sample.policy_versions[0])]
    if sample.versions is not None:
        for token in np.flatnonzero(sample.versions >= 0).tolist():
            if (version := int(sample.versions[token])) != spans[-1][1]:
                spans.append((token, version))
    return spans


def _row(step: int, group: Group, i: int, rank: str, advantage: FloatArray | None) -> dict[str, Any]:
    sample, prompt = group.samples[i], group.prompt
    score = group.scores.samples[i] if group.scores is not None else Score.invalid("not scored")
    return {
        "step": step,
        "group_id": group.id,
        "prompt_id": prompt.id,
        "rank": rank,
        "sample": sample.index,
        "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "answer": prompt.answer,
        "references": list(prompt.references),
        "response": sample.text,
        **_episode(sample),
        "token_ids": sample.token_ids,
        "reward": total_reward(score),
        "components": dict(score.components),
        "valid": score.valid,
        "reason": score.reason,
        "trace": score.trace,
        "advantage": None if advantage is None or not sample.length else float(np.mean(advantage[sample.trained])),
        "finish_reason": sample.finish_reason,
        "policy_versions": list(sample.policy_versions),
        "version_spans": _version_spans(sample),
        "failed_in_group": _failed(group),
    }
