"""The tool `sql`: what is read, and that nothing can be written, run for ever, or read the clock."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from rlkit.environments.base import EnvironmentContext, EnvironmentFailure, Task
from rlkit.environments.tools.environment import Tools
from rlkit.experience import ToolCall


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "a shop?.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE items(name TEXT, price REAL, sold TEXT, photo BLOB)")
        rows = [("tea", 3.5, "2024-02-29", b"123"), ("cup", 8, "2023-12-31", None), ("a\nb", None, None, None)]
        connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)
    connection.close()
    return file


def ask(database: Path, query: str, **options: Any) -> str:
    config = Tools.Config(tools=[{"kind": "sql", "database": str(database), **options}])
    environment = Tools(config, EnvironmentContext(Tools.tools(config, [None]), [None]))
    environment.reset(Task("1"), 0)
    answer: str = environment.call(ToolCall("sql", {"query": query}))
    asyncio.run(environment.close())
    return answer


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        ("SELECT name, price FROM items WHERE price > 3 ORDER BY price DESC", "name | price\ncup | 8.0\ntea | 3.5"),
        ("SELECT * FROM items WHERE name = 'tea'", "name | price | sold | photo\ntea | 3.5 | 2024-02-29 | (3 bytes)"),
        ("SELECT name, price AS p FROM items WHERE price IS NULL", "name | p\na\\nb | NULL"),
        ("SELECT 1 WHERE 0", "1\n(no rows)"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 3) SELECT sum(i) s FROM n", "s\n6"),
        ("SELECT name FROM sqlite_master", "name\nitems"),
        ("SELECT name FROM pragma_table_info('items') LIMIT 2", "name\nname\nprice"),
        (
            "SELECT strftime('%Y', sold) y, count(*) c FROM items WHERE sold IS NOT NULL GROUP BY y",
            "y | c\n2023 | 1\n2024 | 1",
        ),
        ("SELECT date('2024-02-29', '+1 day') d, julianday('2000-01-01') j", "d | j\n2024-03-01 | 2451544.5"),
        ("-- nothing", "(nothing was asked)"),
        ("SELECT upper(name) || '!' u FROM items LIMIT 1", "u\nTEA!"),
    ],
)
def test_reading(database: Path, query: str, answer: str) -> None:
    assert ask(database, query) == answer


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO items VALUES ('x', 1, NULL, NULL)",
        "UPDATE items SET price = 0",
        "DELETE FROM items",
        "DROP TABLE items",
        "CREATE TABLE t(a)",
        "CREATE TEMP TABLE t(a)",
        "ATTACH 'other.db' AS other",
        "PRAGMA journal_mode = WAL",
        "PRAGMA query_only = OFF",
        "PRAGMA user_version = 3",
        "BEGIN IMMEDIATE",
        "ALTER TABLE items ADD COLUMN x",
        "ANALYZE",
    ],
)
def test_what_is_not_reading_is_refused(database: Path, query: str) -> None:
    before = hashlib.sha256(database.read_bytes()).digest()
    assert ask(database, query).startswith("error: the database can only be read")
    assert hashlib.sha256(database.read_bytes()).digest() == before
    assert [file.name for file in database.parent.iterdir()] == [database.name]


def test_a_copy_cannot_be_made(database: Path) -> None:
    assert ask(database, f"VACUUM INTO '{database.parent}/copy.db'").startswith("error: ")
    assert [file.name for file in database.parent.iterdir()] == [database.name]


@pytest.mark.parametrize(
    "asked",
    [
        "load_extension('x')",
        "random()",
        "randomblob(8)",
        "CURRENT_TIMESTAMP",
        "current_date",
        "date('now')",
        "datetime()",
        "strftime('%s')",
        "time('NOW')",
    ],
)
def test_what_differs_from_call_to_call_is_refused(database: Path, asked: str) -> None:
    name = asked.partition("(")[0]
    refusals = (f"error: not authorized to use function: {name}", "error: the clock is not read")
    assert ask(database, f"SELECT {asked}").startswith(refusals)


def test_mistakes_are_for_the_policy_to_read(database: Path) -> None:
    assert ask(database, "SELECT nam FROM items") == "error: no such column: nam"
    assert ask(database, "SELEC 1") == 'error: near "SELEC": syntax error'
    assert "one statement at a time" in ask(database, "SELECT 1; DROP TABLE items")


def test_work_rows_and_sizes_have_limits(database: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT {} FROM n"
    assert ask(database, endless.format("count(*)"), million_instructions=0.5) == (
        "error: stopped: the query takes too much work"
    )
    assert ask(database, endless.format("i"), rows=2) == "i\n1\n2\n... and more than these 2 rows"
    assert ask(database, "SELECT zeroblob(1000000000)") == "error: string or blob too big"
    assert ask(database, "SELECT replace(hex(zeroblob(300)), '00', 'x') x").endswith("x... (300 characters)")


def test_a_database_for_each_problem(database: Path) -> None:
    name = database.name
    config = Tools.Config(tools=[{"kind": "sql", "database": f"{database.parent}/{{db}}"}])
    assert Tools.needs(config).columns == ("db",)
    environment = Tools(config, EnvironmentContext(Tools.tools(config, [None]), [None]))
    environment.reset(Task("1", columns={"db": name}), 0)
    assert environment.call(ToolCall("sql", {"query": "SELECT count(*) c FROM items"})) == "c\n3"
    environment.reset(Task("2", columns={"db": "gone.db"}), 0)
    with pytest.raises(EnvironmentFailure, match=r"there is no database .*gone\.db"):
        environment.call(ToolCall("sql", {"query": "SELECT 1"}))


def test_what_is_no_database_is_the_environments_failure(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no database, but long enough to look like one" * 100)
    with pytest.raises(EnvironmentFailure, match="file is not a database"):
        ask(file, "SELECT 1")
