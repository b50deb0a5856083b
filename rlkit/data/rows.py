"""From a row of the user's table to a Problem: what columns mean, and what makes a row unusable."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from rlkit.data.base import BadRow, DataConfig, DataError, Problem, Response
from rlkit.data.cells import Chat, Row, RowError, cell, text
from rlkit.data.stored import picked, stored
from rlkit.experience import Message, PreferencePair
from rlkit.experience.types import BoolArray

ANSWER_MARKER = "####"
"""In GSM8K this precedes the final answer, after the worked solution."""

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
_ROWS_SHOWN = 5
DIGEST_BYTES = 16
IntArray = NDArray[np.int64]


class RowsConfig(DataConfig):
    """Options of every source with rows."""

    answer_column: str | None = None
    """The gold answer: a text or a number; of `... #### 72` only `72` is used. null: there is none."""
    reference_columns: tuple[str, ...] = ()
    """Columns with reference answers (each a text or a list of texts). Empty: the whole text of the answer column. As
    everywhere, a column inside another is named with a dot: `reward_model.ground_truth`."""
    strip_annotations: bool = True
    """Remove GSM8K's calculator annotations (`<<48/2=24>>`) from references and answers."""
    system_prompt: str | None = None
    """System message for every prompt without one."""
    id_column: str | None = None
    """Column with a unique id of each problem (a text or an integer). null: file name and row number."""
    heldout_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the problems to hold out if no held-out data are named; null then means 0.05."""
    heldout_seed: int = Field(default=0, ge=0)
    """Seed for choosing the held-out problems. Separate from the run's `seed`, so that runs with different seeds are
    judged on the same problems."""

    @field_validator("reference_columns", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def named_columns(self) -> dict[str, str]:
        """Return key -> column that the rows must have."""
        named = {"answer_column": self.answer_column, "id_column": self.id_column}
        named |= {f"reference_columns[{i}]": column for i, column in enumerate(self.reference_columns)}
        return {key: column for key, column in named.items() if column is not None}

    def text_columns(self) -> frozenset[str]:
        """Return the columns of CSV files that are read as texts, whatever they look like."""
        return frozenset(self.named_columns().values())

    def used_columns(self) -> frozenset[str]:
        """Return the columns that are not passed on with the prompt."""
        return self.text_columns()


class ColumnsConfig(RowsConfig):
    prompt_column: str = "question"
    """The question: a text, or a list of chat messages (`{"role": ..., "content": ...}`)."""
    answer_column: str | None = "answer"
    """The gold answer: a text or a number; of `... #### 72` only `72` is used. null: there is none."""

    def named_columns(self) -> dict[str, str]:
        return {"prompt_column": self.prompt_column} | super().named_columns()


class Parts(NamedTuple):
    """What is read from a row: its prompt, and what the row records."""

    messages: Chat
    responses: tuple[Response, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()


def missing_columns(config: RowsConfig, present: Iterable[str], where: str) -> list[str]:
    """Return a message for each configured column that `where` lacks, with the nearest name and the remedy."""
    columns = list(present)
    messages = []
    for key, column in config.named_columns().items():
        if column in columns or column.partition(".")[0] in columns:  # columns inside it are checked row by row
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
) -> tuple[Sequence[Problem], list[BadRow]]:
    """Parse `(origin, row)` pairs; return problems in the order of the rows, and unusable rows. `read(row, origin)`
    raises RowError.

    `gather`: rows with the same prompt form one problem.
    """
    used, by_prompt = config.used_columns(), gather and config.id_column is None
    bad: list[BadRow] = []
    keys, marks = bytearray(), bytearray()

    def usable() -> Iterator[Problem]:
        for origin, row in rows:
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                problem = _problem(origin, row, config, read(row, origin), id_prefix, used)
            except RowError as error:
                bad.append(BadRow(origin, str(error), error.remedy, systematic=error.systematic))
                continue
            keys.extend(digest(repr((problem.messages, problem.answer)) if by_prompt else problem.id))
            marks.append(_has_marker(row, config))
            yield problem

    problems = stored(usable())
    key, marked = np.frombuffer(keys, f"S{DIGEST_BYTES}"), np.frombuffer(marks, np.bool_)
    kept = np.arange(len(problems))
    if 2 * marked.sum() > len(marked):
        # If most answers have the marker, one without is a cut-off solution and not an answer.
        reason = f"{config.answer_column} has no {ANSWER_MARKER} with the final answer, unlike other rows"
        bad += [BadRow(problem.origin, reason) for problem in picked(problems, kept[~marked])]
        kept = kept[marked]
    _, first, same = np.unique(key[kept], return_index=True, return_inverse=True)
    leader = kept[first[same]]  # [kept] the first row with its key
    clashes = []
    for i in () if by_prompt else np.flatnonzero(leader != kept):
        problem, earlier = problems[kept[i]], problems[leader[i]]
        if gather and problem.messages == earlier.messages:
            continue
        reason = f"{config.id_column} {problem.id!r} was already used by {earlier.origin}"
        if config.id_column is None:
            reason = "two files have the same name: rename one, or name the rows with data.id_column"
        bad.append(BadRow(problem.origin, reason + " with another prompt" * gather))
        clashes.append(i)
    return _gathered(problems, np.delete(kept, clashes), np.delete(leader, clashes)), bad


def _gathered(problems: Sequence[Problem], rows: IntArray, leader: IntArray) -> Sequence[Problem]:
    """Merge the `rows` that have the same `leader` into one problem."""
    order = np.argsort(leader, kind="stable")
    starts = np.flatnonzero(np.diff(leader[order], prepend=-1))
    if len(starts) == len(rows):
        return picked(problems, rows)
    ends = (*starts[1:], len(rows))
    return stored(_together(picked(problems, rows[order[a:b]])) for a, b in zip(starts, ends, strict=True))


def _together(problems: Sequence[Problem]) -> Problem:
    """Merge problems with the same prompt. Columns whose values differ belong to the responses and are left out."""
    first, *others = problems
    if not others:
        return first
    columns = {k: v for k, v in first.columns.items() if all(other.columns.get(k) == v for other in others)}
    return replace(first, columns=columns, responses=tuple(r for problem in problems for r in problem.responses))


def refuse_too_many_bad_rows(
    bad: Sequence[BadRow], rows: int, max_share: float, what: str, columns: Mapping[str, str] | None = None
) -> None:
    """Raise DataError if more than `max_share` of `rows`, or all, are bad; it shows the first few and the remedy.

    `columns`: key -> the column that it names.
    """
    if rows > 0 and len(bad) < rows and len(bad) <= max_share * rows + 1e-9:
        return
    if rows == 0:
        raise DataError(f"{what} has no rows.")
    raise DataError(
        f"{what}: {len(bad)} of {rows} rows cannot be used "
        f"({len(bad) / rows:.1%}; data.max_bad_row_share allows {max_share:.1%}):{first_rows(bad)}\n"
        f"{_remedy(bad, rows, columns or {})}."
    )


def first_rows(bad: Sequence[BadRow]) -> str:
    more = f"\n  ... and {len(bad) - _ROWS_SHOWN} more" if len(bad) > _ROWS_SHOWN else ""
    return "".join(f"\n  {row.origin}: {row.reason}" for row in bad[:_ROWS_SHOWN]) + more


def _remedy(bad: Sequence[BadRow], rows: int, columns: Mapping[str, str]) -> str:
    remedy, times = Counter(row.remedy for row in bad).most_common(1)[0]
    if longest := max(row.tokens for row in bad if row.remedy == remedy):
        remedy += f" (the longest has {longest})"
    if not remedy or times * 2 < len(bad):
        named = [
            f"data.{key}"
            for key, column in columns.items()
            if any(row.reason.startswith((column, f"no column {column!r}")) for row in bad)
        ]
        other = f", or name other columns ({', '.join(named)})" if named and len(bad) == rows else ""
        remedy = "Correct these rows" + other
    if len(bad) < rows and not any(row.systematic for row in bad):
        remedy += f", or allow more with data.max_bad_row_share={_round_up(len(bad) / rows)}"
    return remedy


def question_key(problem: Problem) -> str:
    """Return a key that is equal for problems with the same question: ignores white space, case, system message."""
    return "\n".join(" ".join(m.content.split()).casefold() for m in problem.question if m.role != "system")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:DIGEST_BYTES]


def held_out(keys: Iterable[str], share: float, seed: int) -> BoolArray | None:
    """Return [keys] whether a key is held out: `share` of the distinct keys, at least one and not all, chosen by a hash
    that does not depend on their order. None: all keys are the same."""
    hashed = np.fromiter((digest(f"{seed}\n{key}") for key in keys), f"S{DIGEST_BYTES}")
    different = np.unique(hashed)
    if len(different) < 2:
        return None
    count = min(max(1, round(share * len(different))), len(different) - 1)
    return hashed <= different[count - 1]


def _round_up(share: float) -> float:
    return math.ceil(round(share * 100, 6)) / 100


def _has_marker(row: Row, config: RowsConfig) -> bool:
    text = None if config.answer_column is None else row.get(config.answer_column)
    return isinstance(text, str) and ANSWER_MARKER in text


def _problem(origin: str, row: Row, config: RowsConfig, parts: Parts, id_prefix: str, used: frozenset[str]) -> Problem:
    answer_text = None if config.answer_column is None else _answer_text(row, config)
    answer = answer_text
    if answer_text is not None and ANSWER_MARKER in answer_text:
        answer = answer_text.rpartition(ANSWER_MARKER)[2].strip()
        if not answer:
            raise RowError(f"{config.answer_column} has nothing after {ANSWER_MARKER}")
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
        # A column of numbers with gaps is read as floats: 72.0 was 72 in the file.
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
