"""From a row of a user's table to a Problem: what columns mean, and what makes a row unusable."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from rlkit.data.base import BadRow, DataConfig, DataError, Problem, Response
from rlkit.data.cells import Chat, Row, RowError, cell, text
from rlkit.experience import Message, PreferencePair

ANSWER_MARKER = "####"
"""In GSM8K the final answer follows this, after the worked solution."""

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
_ROWS_SHOWN = 5


class RowsConfig(DataConfig):
    """Of every source with rows."""

    answer_column: str | None = None
    """The gold answer: a text or a number; from `... #### 72` only `72` is used. null: there is none."""
    reference_columns: tuple[str, ...] = ()
    """Columns with reference answers (a text or a list of texts each). Empty: the whole text of the answer column. A
    column inside another is named with a dot, as everywhere: `reward_model.ground_truth`."""
    strip_annotations: bool = True
    """Remove GSM8K's calculator annotations (`<<48/2=24>>`) from references and answers."""
    system_prompt: str | None = None
    """System message for every prompt that has none."""
    id_column: str | None = None
    """Column with a unique name of each problem (text or whole number). null: file name and row number."""
    heldout_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the problems held out if no held-out data are named; null then means 0.05."""
    heldout_seed: int = Field(default=0, ge=0)
    """Chooses the held-out problems; not the run's seed, so runs with several seeds are judged alike."""

    @field_validator("reference_columns", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def named_columns(self) -> dict[str, str]:
        """Key -> column that the rows must have."""
        named = {"answer_column": self.answer_column, "id_column": self.id_column}
        named |= {f"reference_columns[{i}]": column for i, column in enumerate(self.reference_columns)}
        return {key: column for key, column in named.items() if column is not None}

    def text_columns(self) -> frozenset[str]:
        """Columns that CSV files hold as texts, whatever they look like."""
        return frozenset(self.named_columns().values())

    def used_columns(self) -> frozenset[str]:
        """Columns that do not travel with the prompt."""
        return self.text_columns()


class ColumnsConfig(RowsConfig):
    prompt_column: str = "question"
    """The question: a text, or a list of chat messages (`{"role": ..., "content": ...}`)."""
    answer_column: str | None = "answer"
    """The gold answer: a text or a number; from `... #### 72` only `72` is used. null: there is none."""

    def named_columns(self) -> dict[str, str]:
        return {"prompt_column": self.prompt_column} | super().named_columns()


class Parts(NamedTuple):
    """What a kind of rows makes of one: its prompt, and what the row records."""

    messages: Chat
    responses: tuple[Response, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()


def missing_columns(config: RowsConfig, present: Iterable[str], where: str) -> list[str]:
    """A message for each configured column that `where` lacks, with the nearest name and the remedy."""
    columns = list(present)
    messages = []
    for key, column in config.named_columns().items():
        if column in columns or column.partition(".")[0] in columns:  # what is inside is judged row by row
            continue
        near = difflib.get_close_matches(column, columns, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        none = " (data.answer_column=null if there are no answers)" if key == "answer_column" else ""
        messages.append(
            f"{where} has no column {column!r}.{hint} Its columns are {', '.join(columns) or 'none'}; "
            f"set data.{key.split('[')[0]}{none}."
        )
    return messages


def parse_rows(
    rows: Iterable[tuple[str, Row | BadRow]],
    config: RowsConfig,
    read: Callable[[Row, str], Parts],
    id_prefix: str = "",
    *,
    gather: bool = False,
) -> tuple[list[Problem], list[BadRow]]:
    """Problems and unusable rows of `(origin, row)` pairs, in order; `read(row, origin)` raises RowError.

    `gather`: rows with the same prompt are one problem.
    """
    pairs = list(rows)
    marked = sum(_has_marker(row, config) for _, row in pairs)
    # Where most answers carry the marker, one without is a cut-off solution and not an answer.
    marker_required = marked * 2 > len(pairs)
    used = config.used_columns()
    bad: list[BadRow] = []
    same: dict[Any, list[Problem]] = {}
    for origin, row in pairs:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            problem = _problem(origin, row, config, read(row, origin), marker_required, id_prefix, used)
        except RowError as error:
            bad.append(BadRow(origin, str(error)))
            continue
        by_prompt = gather and config.id_column is None
        known = same.setdefault((problem.messages, problem.answer) if by_prompt else problem.id, [])
        if known and not (gather and known[0].messages == problem.messages):
            how = " with another prompt" if gather else ""
            bad.append(BadRow(origin, f"{config.id_column} {problem.id!r} was already used by {known[0].origin}{how}"))
        else:
            known.append(problem)
    return [_together(problems) for problems in same.values()], bad


def _together(problems: Sequence[Problem]) -> Problem:
    """Columns with different values for one prompt belong to its responses, and are left out."""
    first, *others = problems
    if not others:
        return first
    columns = {k: v for k, v in first.columns.items() if all(other.columns.get(k) == v for other in others)}
    return replace(first, columns=columns, responses=tuple(r for problem in problems for r in problem.responses))


def refuse_too_many_bad_rows(bad: Sequence[BadRow], rows: int, max_share: float, what: str) -> None:
    """Raise DataError if more than `max_share` of `rows` are bad, or all are; shows the first few and the remedy."""
    if rows > 0 and len(bad) < rows and len(bad) <= max_share * rows + 1e-9:
        return
    if rows == 0:
        raise DataError(f"{what} has no rows.")
    shown = "".join(f"\n  {row.origin}: {row.reason}" for row in bad[:_ROWS_SHOWN])
    more = f"\n  ... and {len(bad) - _ROWS_SHOWN} more" if len(bad) > _ROWS_SHOWN else ""
    remedy, times = Counter(row.remedy for row in bad).most_common(1)[0]
    if not remedy or times * 2 < len(bad):
        remedy = "Correct these rows" + (
            " or the column names (data.prompt_column, data.answer_column, ...)" if len(bad) == rows else ""
        )
    if len(bad) < rows:
        remedy += f", or allow more with data.max_bad_row_share={_round_up(len(bad) / rows)}"
    raise DataError(
        f"{what}: {len(bad)} of {rows} rows cannot be used "
        f"({len(bad) / rows:.1%}; data.max_bad_row_share allows {max_share:.1%}):{shown}{more}\n{remedy}."
    )


def question_key(problem: Problem) -> str:
    """Equal for problems that ask the same: ignores white space, case and the system message."""
    return "\n".join(" ".join(m.content.split()).casefold() for m in problem.question if m.role != "system")


def heldout_keys(keys: Iterable[str], share: float, seed: int) -> set[str]:
    """`share` of the different keys, at least one and not all, by a hash that does not depend on the rows' order."""
    different = set(keys)
    count = min(max(1, round(share * len(different))), len(different) - 1)
    return set(sorted(different, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())[:count])


def _round_up(share: float) -> float:
    return math.ceil(round(share * 100, 6)) / 100


def _has_marker(row: Row | BadRow, config: RowsConfig) -> bool:
    if isinstance(row, BadRow) or config.answer_column is None:
        return False
    text = row.get(config.answer_column)
    return isinstance(text, str) and ANSWER_MARKER in text


def _problem(
    origin: str, row: Row, config: RowsConfig, parts: Parts, marker_required: bool, id_prefix: str, used: frozenset[str]
) -> Problem:
    answer_text = None if config.answer_column is None else _answer_text(row, config)
    answer = answer_text
    if answer_text is not None and ANSWER_MARKER in answer_text:
        answer = answer_text.rpartition(ANSWER_MARKER)[2].strip()
        if not answer:
            raise RowError(f"{config.answer_column} has nothing after {ANSWER_MARKER}")
    elif marker_required:
        raise RowError(f"{config.answer_column} has no {ANSWER_MARKER} with the final answer, as other rows have")
    if config.reference_columns:
        references = _references(row, config)
    else:
        references = (answer_text,) if answer_text is not None else ()
    messages = parts.messages
    if config.system_prompt and messages[0].role != "system":
        messages = (Message("system", config.system_prompt), *messages)
    return Problem(
        id=id_prefix + _identity(origin, row, config),
        messages=messages,
        references=references,
        answer=answer,
        columns={key: value for key, value in row.items() if key not in used},
        origin=origin,
        responses=parts.responses,
        pairs=parts.pairs,
    )


def _clean(text: str, config: RowsConfig) -> str:
    return _CALCULATOR_ANNOTATION.sub("", text) if config.strip_annotations else text


def _answer_text(row: Row, config: RowsConfig) -> str:
    assert config.answer_column is not None
    value = cell(row, config.answer_column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{config.answer_column} is {value}")
        # A number column with gaps is read as floats: 72.0 was 72 in the file.
        return str(int(value)) if float(value).is_integer() else str(value)
    return _clean(text(value, config.answer_column), config).strip()


def _references(row: Row, config: RowsConfig) -> tuple[str, ...]:
    references: list[str] = []
    for column in config.reference_columns:
        value = cell(row, column)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            references.append(_clean(text(item, column), config).strip())
    if not references:
        raise RowError(f"{' and '.join(config.reference_columns)}: an empty list, no reference answer")
    return tuple(references)


def _identity(origin: str, row: Row, config: RowsConfig) -> str:
    if config.id_column is None:
        return origin
    value = cell(row, config.id_column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text(value, config.id_column)
