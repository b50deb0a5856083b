"""From a row of a user's table to a Problem: what columns mean, and what makes a row unusable."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from rlkit.data.base import BadRow, DataConfig, DataError, Problem
from rlkit.experience import Message

ANSWER_MARKER = "####"
"""In GSM8K the final answer follows this, after the worked solution."""

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
_ROWS_SHOWN = 5


class ColumnsConfig(DataConfig):
    prompt_column: str = "question"
    """The question: a text, or a list of chat messages (`{"role": ..., "content": ...}`). A column inside another is
    named with a dot, here and below: `reward_model.ground_truth`."""
    answer_column: str | None = "answer"
    """The gold answer: a text or a number; from `... #### 72` only `72` is used. null: there is none."""
    reference_columns: tuple[str, ...] = ()
    """Columns with reference answers (a text or a list of texts each). Empty: the whole text of the answer column."""
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
        named = {"prompt_column": self.prompt_column}
        if self.answer_column is not None:
            named["answer_column"] = self.answer_column
        if self.id_column is not None:
            named["id_column"] = self.id_column
        return named | {f"reference_columns[{i}]": column for i, column in enumerate(self.reference_columns)}


class RowError(ValueError):
    """This row cannot be used; the message is the reason."""


def missing_columns(config: ColumnsConfig, present: Iterable[str], where: str) -> list[str]:
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
    rows: Iterable[tuple[str, Mapping[str, Any] | BadRow]], config: ColumnsConfig, id_prefix: str = ""
) -> tuple[list[Problem], list[BadRow]]:
    """Problems and unusable rows of `(origin, row)` pairs, in order."""
    pairs = list(rows)
    marked = sum(_has_marker(row, config) for _, row in pairs)
    # Where most answers carry the marker, one without is a cut-off solution and not an answer.
    marker_required = marked * 2 > len(pairs)
    problems: list[Problem] = []
    bad: list[BadRow] = []
    seen: dict[str, str] = {}
    for origin, row in pairs:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            problem = _problem(origin, row, config, marker_required, id_prefix)
        except RowError as error:
            bad.append(BadRow(origin, str(error)))
            continue
        if problem.id in seen:
            bad.append(BadRow(origin, f"{config.id_column} {problem.id!r} was already used by {seen[problem.id]}"))
            continue
        seen[problem.id] = origin
        problems.append(problem)
    return problems, bad


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
    return "\n".join(" ".join(m.content.split()).casefold() for m in problem.messages if m.role != "system")


def heldout_keys(keys: Iterable[str], share: float, seed: int) -> set[str]:
    """`share` of the different keys, at least one and not all, by a hash that does not depend on the rows' order."""
    different = set(keys)
    count = min(max(1, round(share * len(different))), len(different) - 1)
    return set(sorted(different, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())[:count])


def _round_up(share: float) -> float:
    return math.ceil(round(share * 100, 6)) / 100


def _has_marker(row: Mapping[str, Any] | BadRow, config: ColumnsConfig) -> bool:
    if isinstance(row, BadRow) or config.answer_column is None:
        return False
    text = row.get(config.answer_column)
    return isinstance(text, str) and ANSWER_MARKER in text


def _problem(
    origin: str, row: Mapping[str, Any], config: ColumnsConfig, marker_required: bool, id_prefix: str
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
    named = set(config.named_columns().values())
    return Problem(
        id=id_prefix + _identity(origin, row, config),
        messages=_messages(row, config),
        references=references,
        answer=answer,
        columns={key: value for key, value in row.items() if key not in named},
        origin=origin,
    )


def _cell(row: Mapping[str, Any], column: str) -> Any:
    value = row[column] if column in row else _inner(row, column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError(f"{column} is null")
    return value


def _inner(row: Mapping[str, Any], column: str) -> Any:
    """Of a column inside another: `outer.inner`."""
    outer, dot, rest = column.partition(".")
    if dot and isinstance(row.get(outer), Mapping):
        try:
            return _cell(row[outer], rest)
        except RowError as error:
            raise RowError(f"in {outer}: {error}") from error
    near = difflib.get_close_matches(column, row, n=1)
    raise RowError(f"no column {column!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))


def _text(value: Any, what: str) -> str:
    if isinstance(value, Mapping) and value:
        raise RowError(f"{what} has columns inside it; name one of them: {', '.join(f'{what}.{key}' for key in value)}")
    if not isinstance(value, str):
        raise RowError(f"{what} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{what} is empty")
    return value


def _clean(text: str, config: ColumnsConfig) -> str:
    return _CALCULATOR_ANNOTATION.sub("", text) if config.strip_annotations else text


def _answer_text(row: Mapping[str, Any], config: ColumnsConfig) -> str:
    assert config.answer_column is not None
    value = _cell(row, config.answer_column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{config.answer_column} is {value}")
        # A number column with gaps is read as floats: 72.0 was 72 in the file.
        return str(int(value)) if float(value).is_integer() else str(value)
    return _clean(_text(value, config.answer_column), config).strip()


def _references(row: Mapping[str, Any], config: ColumnsConfig) -> tuple[str, ...]:
    references: list[str] = []
    for column in config.reference_columns:
        value = _cell(row, column)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            references.append(_clean(_text(text, column), config).strip())
    if not references:
        raise RowError(f"{' and '.join(config.reference_columns)}: an empty list, no reference answer")
    return tuple(references)


def _messages(row: Mapping[str, Any], config: ColumnsConfig) -> tuple[Message, ...]:
    column = config.prompt_column
    value = _cell(row, column)
    if isinstance(value, str):
        messages = [Message("user", _text(value, column))]
    elif isinstance(value, (list, tuple)):
        messages = [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]
    else:
        raise RowError(f"{column} must be a text or a list of chat messages, not {type(value).__name__}")
    if not messages:
        raise RowError(f"{column} is an empty list")
    if messages[-1].role == "assistant":
        raise RowError(f"{column} ends with an assistant message: there is nothing to answer")
    if config.system_prompt and messages[0].role != "system":
        messages.insert(0, Message("system", config.system_prompt))
    return tuple(messages)


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{where} must be a chat message with role and content, not {type(item).__name__}")
    for key in ("role", "content"):
        if key not in item:
            raise RowError(f"{where} has no {key!r}")
    return Message(_text(item["role"], f"{where}.role"), _text(item["content"], f"{where}.content"))


def _identity(origin: str, row: Mapping[str, Any], config: ColumnsConfig) -> str:
    if config.id_column is None:
        return origin
    value = _cell(row, config.id_column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, config.id_column)
