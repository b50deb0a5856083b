"""Converts answers to rows of samples.jsonl and back: every number of an evaluation is computed from these rows
alone."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rewards.base import Reward
from rlkit.config.parts import Part
from rlkit.data.base import Problem
from rlkit.data.rows import digest, question_key
from rlkit.experience import Group, GroupScores, Message, Sample, Score, UserError
from rlkit.experience.scores import kind_of, rightness
from rlkit.experience.types import UNJUDGED
from rlkit.tracking.samples import sample_rows

Row = Mapping[str, Any]
Decoding = Literal["sampled", "greedy", "recorded"]
LONG = ("token_ids", "prompt", "response", "turns", "segments", "references", "trace", "version_spans", "group_rewards")
"""Keys that are used for no number."""
ASKS = "asks"
"""Replaces `prompt` when long keys are left out: equal for prompts that ask the same."""
Asked = tuple[str, Decoding]
"""Name of a set, and how its questions are answered."""
Place = tuple[str, int]
"""Id of a group, and index of an answer in it."""


def answer_rows(
    step: int,
    asked: Asked,
    judged: Group,
    chosen: Group | None,
    judge: Part | None,
    lengths: Mapping[Place, int],
    failures: Mapping[Place, str],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each answer. `chosen`: the group with the scores of the reward that chooses; if None, the judge's
    scores are the reward. `lengths` and `failures` are for answers from an endpoint."""
    said = [score for _, score in judged.scored()]
    rewards = said if chosen is None else [score for _, score in chosen.scored()]
    failed = [failures.get((judged.id, sample.index)) for sample in judged.samples]
    scores = (Score.invalid(why) if why else score for why, score in zip(failed, rewards, strict=True))
    name, decoding = asked
    rows = sample_rows(step, [judged.with_scores(GroupScores(tuple(scores)))], None, None)
    for row, sample, verdict, why in zip(rows, judged.samples, said, failed, strict=True):
        yield {
            **row,
            "kind": "evaluation",
            **({"set": name} if name else {}),
            "decoding": decoding,
            "length": _length(sample, lengths.get((judged.id, sample.index))),
            "staleness": None,
            **_verdict(Score.invalid(why) if why else verdict),
            "vote": _vote(judge, sample),
        }


def _verdict(score: Score) -> dict[str, Any]:
    """Return the verdict; `unjudged`: why the judge gave none."""
    if not score.valid or score.reason == UNJUDGED:
        return {"correct": None, "verdict": None, "unjudged": score.reason}
    right = rightness(score)
    return {"correct": right, "verdict": score.value if right is None else None, "unjudged": None}


def _length(sample: Sample, counted: int | None) -> int | None:
    """Number of tokens; None if they were not counted."""
    return sample.length if len(sample) else counted


def _vote(judge: Part | None, sample: Sample) -> str | None:
    kind: type[Reward] | None = None if judge is None else judge.cls
    return None if kind is None or judge is None else kind.vote(judge.config, sample.text)


def read_rows(folder: Path, without: Collection[str] = ()) -> list[Row]:
    """Read the rows of an evaluation or a run. A half-written last line is left out; if an answer was judged again
    (because its group was half written when an evaluation ended), the newer row counts. `without`: keys to drop
    (`prompt` is replaced by `ASKS`). Raises UserError."""
    rows = {
        (row.get("step"), row.get("group_id"), row.get("sample")): row for row in written_rows(folder, without=without)
    }
    return list(rows.values())


def written_rows(folder: Path, name: str = "samples.jsonl", without: Collection[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file in a folder, one by one. Raises UserError."""
    file = folder / name
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.endswith("\n"):
                    yield _row(line, f"{file}:{number}", without)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def cut_to_whole_lines(file: Path) -> None:
    content = file.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


def _row(line: str, where: str, without: Collection[str]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    kept = {key: value for key, value in row.items() if key not in without}
    return kept | {ASKS: _asks(row)} if "prompt" in without else kept


def _asks(row: Row) -> bytes:
    messages = tuple(Message(one["role"], one["content"]) for one in row.get("prompt") or ())
    return digest(question_key(Problem("", messages)))


def answered(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """Return the (step, group) pairs that have all their answers."""
    have: dict[tuple[int, str], int] = {}
    for row in rows:
        key = int(row["step"]), str(row["group_id"])
        have[key] = have.get(key, 0) + 1
    sizes = {(int(row["step"]), str(row["group_id"])): int(row.get("group_size") or 0) for row in rows}
    return {key for key, count in have.items() if count >= sizes[key] > 0}


def causes(rows: Sequence[Row]) -> dict[str, int]:
    """Count why answers were not judged: class of reason -> how many."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.get("unjudged"):
            kind = kind_of(str(row["unjudged"]))
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
