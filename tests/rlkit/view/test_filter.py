"""The filter language: worked examples on rows, places of errors, and that nothing typed becomes SQL."""

from __future__ import annotations

import re
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.view.filter import SQL, FilterError, compile_filter, field

NAMES = {"component": {"format": "x1", "math/format": "x3", "odd name": "x4"}, "rescored": {"strict": "x2"}}
ROWS = [
    # id, reward, correct, finish_reason, dropped, valid
    (0, 2.0, 0.0, "stop", None, 1),
    (1, 0.5, 1.0, "length", None, 1),
    (2, None, None, "stop", "all_wrong", 0),
    (3, -1.5, 0.0, 'it\'s "odd"', None, 1),
]
FORMAT = {0: 1.0, 1: 0.0, 3: 0.4}


@pytest.fixture(scope="module")
def table() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    names = sorted({match for sql, _ in SQL.values() for match in re.findall(r'rows\."?(\w+)', sql)})
    columns = ", ".join(f'"{name}"' for name in [*names, "x1", "x2", "x3", "x4"])
    connection.execute(f"CREATE TABLE rows ({columns})")
    connection.execute("CREATE TABLE token_rows (step, group_id, sample)")
    kept = '"id", "reward", "correct", "finish_reason", "dropped", "valid"'
    connection.executemany(f"INSERT INTO rows ({kept}) VALUES (?, ?, ?, ?, ?, ?)", ROWS)
    connection.executemany("UPDATE rows SET x1 = ? WHERE id = ?", [(value, row) for row, value in FORMAT.items()])
    connection.execute("UPDATE rows SET x2 = 0.0 WHERE id = 0")
    return connection


def chosen(table: sqlite3.Connection, text: str) -> list[int]:
    sql = compile_filter(text, NAMES)
    return [row for (row,) in table.execute(f"SELECT id FROM rows WHERE {sql.text} ORDER BY id", sql.parameters)]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("reward > 1", [0]),
        ("reward>-1.6 and reward<=.5", [1, 3]),
        ("correct = 0", [0, 3]),
        ("not correct = 0", [1]),  # unknown is neither
        ("correct is null", [2]),
        ("correct is not null and valid", [0, 1, 3]),
        ("valid = false", [2]),
        ("not valid", [2]),
        ('finish = "length" or reward > 1', [0, 1]),
        ("finish != 'stop'", [1, 3]),
        ("finish = 'it''s \"odd\"'", [3]),
        ('finish contains "odd"', [3]),
        ('reward > 1 and correct = 0 and (finish = "length" or component.format > 0.5)', [0]),
        ("component:format < 0.5", [1, 3]),
        ('component."format" = 1', [0]),
        ("reward > rescored.strict", [0]),
        ("reward > 1 or correct = 1 and reward > 1", [0]),  # and binds closer
        ("reward > 1 AND NOT dropped IS NOT NULL", [0]),
        ("tokens", []),
        ("reward = 2e0 or reward == 0.5 or reward <> 2 and reward < 0", [0, 1, 3]),
    ],
)
def test_expressions(table: sqlite3.Connection, text: str, rows: list[int]) -> None:
    assert chosen(table, text) == rows


@pytest.mark.parametrize(
    ("text", "character", "words"),
    [
        ("rewrd > 1", 1, "did you mean reward?"),
        ("reward > ", 10, "expected a number, or another numeric field, not the end"),
        ("reward 1", 8, "expected one of ="),
        ("reward > 1 correct", 12, "expected 'and', 'or' or the end"),
        ("(reward > 1", 12, "expected ')'"),
        ("reward > 1 and", 15, "expected a field"),
        ("finish = stop", 10, "expected text in quotes"),
        ('reward = "x"', 10, "expected a number"),
        ('finish = "stop', 10, "no closing quote"),
        ("reward > 1; drop table rows", 11, "unexpected ';'"),
        ("component.none > 1", 1, "this run has format, math/format, odd name"),
        ("reward is 1", 11, "expected 'null' or 'not null'"),
        ("valid = 'x'", 9, "expected true or false"),
        ("", 1, "expected a field"),
        ("(" * 50 + "reward > 1", 41, "at most 40"),
    ],
)
def test_errors_say_where_and_what_is_possible(text: str, character: int, words: str) -> None:
    with pytest.raises(FilterError) as error:
        compile_filter(text, NAMES)
    assert str(error.value).startswith(f"filter, character {character}: ")
    assert words in str(error.value)
    assert error.value.position == character - 1


OWN = [sql for sql, _ in SQL.values()]
WORDS = "reward correct finish valid component.format ( ) and or not is null = < >= 1 -2.5 contains true ? rows.id"
PIECES = st.sampled_from([*WORDS.split(), '"stop"', "'a''b'", "';--", "/*", "1;DROP TABLE rows", "\x00", '"%s"'])


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=12).map(" ".join), st.text(max_size=60)))
def test_whatever_is_typed_is_refused_or_is_one_condition(text: str) -> None:
    """The SQL consists of this package's words alone, and SQLite can prepare it with as many parameters."""
    try:
        sql = compile_filter(text, NAMES)
    except FilterError as error:
        place = error.position
    else:
        place, rest = 0, sql.text
        for own in sorted([*OWN, field("component.format", NAMES).text], key=len, reverse=True):
            rest = rest.replace(own, " ")
        assert re.fullmatch(r"(?:[ ()?,]|=|!=|<=?|>=?|\b(?:AND|OR|NOT|IS|NULL|instr|0)\b)*", rest), rest
        assert sql.text.count("?") == len(sql.parameters)
    assert 0 <= place <= len(text)


def test_texts_are_parameters(table: sqlite3.Connection) -> None:
    assert chosen(table, 'finish = "x\' OR 1=1 --"') == []
    assert chosen(table, "finish = 'x\"; DROP TABLE rows; --'") == []
    assert table.execute("SELECT count(*) FROM rows").fetchone() == (4,)
