"""Reward benchmarks from a user's own copy: questions with right and wrong responses, for `rlkit.evaluate`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rlkit.data.base import DataConfig, Response
from rlkit.data.cells import Row, RowError, cell, prompt_of, text
from rlkit.data.files import DataSetConfig
from rlkit.data.recorded import RecordedSource
from rlkit.data.rows import Parts
from rlkit.experience import Message
from rlkit.experience.reward_benchmarks import (
    judge_bench,
    ppe,
    reward_bench,
    reward_bench_2,
    rm_bench,
)

Answers = tuple[Sequence[str], Sequence[str]]
"""Right answers and wrong answers."""


class Benchmark(RecordedSource):
    """A reward benchmark. The value of a right response is 1, that of a wrong one 0."""

    Config: ClassVar[type[DataConfig]] = DataSetConfig
    title: ClassVar[str]
    asked: ClassVar[str] = "prompt"
    subset: ClassVar[str] = "subset"
    """Columns with the prompt and the subset."""
    one_sided: ClassVar[bool] = False
    """Whether questions count that have only right or only wrong responses."""
    totals: ClassVar[Callable[..., Mapping[str, float]]]
    """The authors' scoring rule: questions -> shares."""

    def provides(self) -> frozenset[str]:
        return super().provides() | {"labels"}

    def _read(self, row: Row, origin: str) -> Parts:
        text(cell(row, self.subset), self.subset)
        answers = self._answers(row)
        responses = tuple(
            Response((Message("assistant", text(answer, "a response")),), value, origin=origin)
            for value, own in zip((1.0, 0.0), answers, strict=True)
            for answer in own
        )
        return Parts(prompt_of(row, self.asked), responses)

    def _answers(self, row: Row) -> Answers:
        """Return the row's right and wrong answers. Raises RowError."""
        return _listed(row, "chosen"), _listed(row, "rejected")


class RewardBench(Benchmark):
    """`data=reward_bench`: two responses to a prompt (arXiv 2403.13787)."""

    title = "RewardBench"
    totals = staticmethod(reward_bench)


class RewardBench2(Benchmark):
    """`data=reward_bench_2`: the best of four, and ties (arXiv 2506.01937)."""

    class Config(DataSetConfig):
        id_column: str | None = "id"
        """Column by which the questions of `Ties` belong together."""

    title = "RewardBench 2"
    totals = staticmethod(reward_bench_2)


class RMBench(Benchmark):
    """`data=rm_bench`: a right and a wrong response, each in three styles (arXiv 2410.16184)."""

    title = "RM-Bench"
    subset = "domain"
    totals = staticmethod(rm_bench)

    def _answers(self, row: Row) -> Answers:
        right, wrong = super()._answers(row)
        if len(right) != 3 or len(wrong) != 3:
            raise RowError(f"chosen and rejected must be three responses each, not {len(right)} and {len(wrong)}")
        return right, wrong


class JudgeBench(Benchmark):
    """`data=judge_bench`: two responses, one of them right (arXiv 2410.12784)."""

    title = "JudgeBench"
    asked, subset = "question", "source"
    totals = staticmethod(judge_bench)

    def _answers(self, row: Row) -> Answers:
        first, second, label = cell(row, "response_A"), cell(row, "response_B"), cell(row, "label")
        if label not in ("A>B", "B>A"):
            raise RowError(f"label is {label!r}, not A>B or B>A")
        return ([first], [second]) if label == "A>B" else ([second], [first])


class PPE(Benchmark):
    """`data=ppe`: many responses to a question, right or wrong (arXiv 2410.14872, the correctness sets)."""

    title = "PPE, correctness"
    subset = "benchmark"
    totals = staticmethod(ppe)
    one_sided = True

    def _answers(self, row: Row) -> Answers:
        named = {int(name[9:]): value for name, value in row.items() if re.fullmatch(r"response_\d+", name)}
        responses, labels = [named[number] for number in sorted(named)], cell(row, "scores")
        if len(responses) != len(labels):
            raise RowError(f"{len(responses)} columns response_N, but {len(labels)} scores")
        right = [response for response, label in zip(responses, labels, strict=True) if label]
        return right, [response for response, label in zip(responses, labels, strict=True) if not label]


def _listed(row: Row, column: str) -> Sequence[Any]:
    """Return the column's list of texts; a single text becomes a list."""
    value = cell(row, column)
    return [value] if isinstance(value, str) else value
