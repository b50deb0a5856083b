"""Results of reward benchmarks from the rewards of responses; for other labelled answers, the share of pairs in
order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.assessment.config import Evaluating
from rlkit.assessment.rows import Row
from rlkit.data.benchmarks import Benchmark
from rlkit.experience import Group
from rlkit.experience.reward_benchmarks import Question, pair_agreement


@dataclass(frozen=True)
class Standing:
    title: str
    values: Mapping[str, float]
    """Shares from 0 to 1."""
    questions: int
    left_out: int
    """Number of questions with a response that has no reward."""


def labelled(rows: Iterable[Row], group: Group, evaluating: Evaluating) -> Iterator[dict[str, Any]]:
    """Yield the rows of recorded answers with the data's label of each, and the question's subset."""
    kind = evaluating.data.cls
    subset = group.prompt.columns.get(kind.subset) if issubclass(kind, Benchmark) else None
    labels = [score.value for _, score in group.scored()] if group.scores else [None] * len(group.samples)
    for row, label in zip(rows, labels, strict=True):
        yield {**row, "label": label, "subset": subset}


def standing(evaluating: Evaluating, rows: Sequence[Row]) -> Standing | None:
    """Compute the results; None unless a reward judges recorded answers whose labels differ."""
    if evaluating.kind != "recorded" or evaluating.judge is None:
        return None
    kind = evaluating.data.cls
    title, totals, one_sided = "Right above wrong", pair_agreement, False
    if issubclass(kind, Benchmark):
        title, totals, one_sided = kind.title, kind.totals, kind.one_sided
    by_question: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_question[str(row["group_id"])].append(row)
    questions: list[Question] = []
    left_out = 0
    for own in by_question.values():
        if any(row.get("reward") is None for row in own):
            left_out += 1
            continue
        right = tuple(float(row["reward"]) for row in own if row["label"] == 1)
        wrong = tuple(float(row["reward"]) for row in own if row["label"] == 0)
        if (right and wrong) or one_sided:
            questions.append(Question(str(own[0]["prompt_id"]), str(own[0].get("subset") or "all"), right, wrong))
    if not questions:
        return None
    return Standing(title, totals(questions), len(questions), left_out)
