"""The tool `sql`: queries to a SQLite file that nobody can modify."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import Field, field_validator

from rlkit.environments.base import EnvironmentFailure, Task
from rlkit.environments.tool import tool
from rlkit.environments.tools.base import Session, ToolOptions

_SCHEMA_PRAGMAS = {
    "table_info",
    "table_xinfo",
    "table_list",
    "index_list",
    "index_info",
    "index_xinfo",
    "foreign_key_list",
    "database_list",
}
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_REFUSED_FUNCTIONS = {"random", "randomblob", "current_date", "current_time", "current_timestamp", "load_extension"}
"""Functions that could do harm, or that answer the same query differently."""
_TIME_FUNCTIONS = {"date": 0, "time": 0, "datetime": 0, "julianday": 0, "unixepoch": 0, "strftime": 1}
"""Name -> position of the time argument; without it, or with 'now', the function reads the clock."""
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_INSTRUCTIONS_PER_LOOK = 1000
_LONGEST_CELL = 200


class SqlSession(Session):
    def __init__(self, options: Sql, shared: Any, task: Task, seconds: float) -> None:
        super().__init__(options, shared, task, seconds)
        self._database = options.database.format_map(task.columns)

    @tool
    def sql(self, query: str) -> str:
        """Query a read-only SQLite database. Its tables: SELECT name, sql FROM sqlite_master.

        query: one SELECT statement
        """
        try:
            with closing(read_only(Path(self._database))) as connection:
                return _answer(connection, query, self.options)
        except sqlite3.Error as error:
            return f"error: {_REFUSALS.get(str(error), error)}"


_REFUSALS = {
    "not authorized": "the database can only be read: SELECT, and PRAGMA table_info and the like",
    "user-defined function raised exception": "the clock is not read: a function of dates needs a date of the data",
    "interrupted": "stopped: the query takes too much work",
}


class Sql(ToolOptions):
    kind: Literal["sql"] = "sql"
    session: ClassVar[type[Session]] = SqlSession
    database: str
    """A SQLite file; {db_id} in it stands for the problem's column `db_id`: spider/{db_id}/{db_id}.sqlite."""
    rows: int = Field(default=20, ge=1)
    """Maximum rows of a result that the policy reads."""
    million_instructions: float = Field(default=10.0, gt=0)
    """Millions of SQLite virtual-machine instructions that a query may take; ten million take about a second. A limit
    in seconds would cut the same query in one run and not in the next."""

    @field_validator("database")
    @classmethod
    def _names_columns(cls, database: str) -> str:
        _columns(database)
        return str(Path(database).expanduser().absolute())  # as in LocalPath

    def needs(self) -> tuple[str, ...]:
        return _columns(self.database)

    def check(self, seconds: float) -> list[str]:
        """Check the database; nothing is checked if each problem has its own file."""
        try:
            if not self.needs():
                read_only(Path(self.database)).close()
        except (EnvironmentFailure, sqlite3.Error) as error:
            return [f"sql: {error}"]
        return []


def _columns(template: str) -> tuple[str, ...]:
    """Return the columns that the template names. Raises ValueError."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"braces must contain the name of a column: {template}")
    return tuple(dict.fromkeys(names))


def read_only(file: Path) -> sqlite3.Connection:
    """Open a connection on which no statement can write or read the clock or random numbers.

    Raises EnvironmentFailure if there is no database, sqlite3.Error if it cannot be opened.
    """
    if not file.is_file():
        raise EnvironmentFailure(f"there is no database {file}")
    connection = sqlite3.connect(f"file:{quote(str(file.resolve()))}?mode=ro", uri=True, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise EnvironmentFailure(f"{file} cannot be read: {error}") from error
    for limit, number in _LIMITS.items():
        connection.setlimit(limit, number)
    clock = sqlite3.connect(":memory:")
    for name, position in _TIME_FUNCTIONS.items():
        connection.create_function(name, -1, _of_given_time(clock, name, position), deterministic=True)
    for name in _SCHEMA_PRAGMAS:  # their tables are declared on first use, which looks like a write
        connection.execute(f"SELECT * FROM pragma_{name} LIMIT 0")
    connection.set_authorizer(_allowed)
    return connection


def _allowed(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION:
        return sqlite3.SQLITE_DENY if (second or "").lower() in _REFUSED_FUNCTIONS else sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA:
        return sqlite3.SQLITE_OK if (first or "").lower() in _SCHEMA_PRAGMAS else sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def _of_given_time(clock: sqlite3.Connection, name: str, position: int) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        time = arguments[position] if len(arguments) > position else "now"
        if isinstance(time, str) and time.lower() in ("now", "subsec", "subsecond"):
            raise ValueError  # SQLite does not pass on its message
        marks = ", ".join("?" * len(arguments))
        return clock.execute(f"SELECT {name}({marks})", arguments).fetchone()[0]

    return function


def _answer(connection: sqlite3.Connection, query: str, options: Sql) -> str:
    looks = int(options.million_instructions * 1e6 / _INSTRUCTIONS_PER_LOOK)

    def too_much() -> bool:
        nonlocal looks
        looks -= 1
        return looks < 0

    connection.set_progress_handler(too_much, _INSTRUCTIONS_PER_LOOK)
    cursor = connection.execute(query)
    rows = list(islice(cursor, options.rows + 1))
    if cursor.description is None:
        return "(nothing was asked)"
    lines = [" | ".join(column[0] for column in cursor.description), *map(_line, rows[: options.rows])]
    if len(rows) > options.rows:
        lines.append(f"... and more than these {options.rows} rows")
    return "\n".join(lines if rows else [*lines, "(no rows)"])


def _line(row: Sequence[Any]) -> str:
    return " | ".join(_cell(value) for value in row)


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}... ({len(text)} characters)"
