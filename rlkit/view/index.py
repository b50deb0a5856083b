"""samples.jsonl as a SQLite table: numbers, names, first characters, full text, and where each row begins in the file.

The table is in a cache folder outside the run, so runs may be read-only. It follows the file by byte offset. Several
processes may follow the same run: a batch of rows and the offset after it are written in one transaction.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.view.rows import Position, listed, number, parsed, read_on, said, text, whole
from rlkit.view.tokens import samples_in

FORMAT = 5
"""Part of a cache file's name. Files of another format are not read, and are removed once they are old."""
UNUSED_DAYS = 30
"""Days after which the unused cache of a run is removed."""
SEARCHED = 4096
"""How many characters at the beginning of a prompt and of a response full text search covers."""
HEAD = 200
"""How many characters of a prompt and of a response lists show."""
MOST_COMPONENTS = 100
MOST_NAMES = 1000
"""Most names of components and rescored rewards: SQLite allows 2,000 columns per table."""
COLUMNS = {
    "id": "INTEGER PRIMARY KEY", "start": "INTEGER", "bytes": "INTEGER", "step": "INTEGER", "group_id": "TEXT",
    "prompt_id": "TEXT", "sample": "INTEGER", "rank": "TEXT", "reward": "REAL", "advantage": "REAL",
    "length": "INTEGER", "correct": "REAL", "verdict": "REAL", "finish_reason": "TEXT", "staleness": "REAL",
    "dropped": "TEXT", "valid": "INTEGER", "reason": "TEXT", "set": "TEXT", "kind": "TEXT", "group_size": "INTEGER",
    "group_mean": "REAL", "spread": "REAL", "digits": "REAL", "decoding": "TEXT",
}  # fmt: skip
"""`start` and `bytes`: where the row is in the file. `group_mean` and `spread` (largest minus smallest) are those of
the whole group's rewards, `digits` is the share of digits in the response's characters, `decoding` an evaluation's."""
_DEFAULTS = {"step": 0, "group_id": "", "prompt_id": "", "sample": 0, "valid": 1, "reason": "", "kind": "training"}
_CONVERTED: dict[str, Callable[[Any], Any]] = {"INTEGER": whole, "REAL": number, "TEXT": text}
_NO_DIGITS = str.maketrans("", "", "0123456789")
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows ({", ".join(f'"{name}" {kind}' for name, kind in COLUMNS.items())});
CREATE INDEX rows_of_group ON rows (step, group_id, sample, dropped);
CREATE INDEX rows_of_prompt ON rows (prompt_id, step DESC);
CREATE INDEX rows_of_evaluation ON rows (step) WHERE kind = 'evaluation';
CREATE TABLE heads (id INTEGER PRIMARY KEY, prompt TEXT, response TEXT);
CREATE TABLE names (key INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE token_rows (step INTEGER, group_id TEXT, sample INTEGER,
    PRIMARY KEY (step, group_id, sample)) WITHOUT ROWID;
CREATE VIRTUAL TABLE texts USING fts5 (prompt, response, content='', tokenize='unicode61');
"""
OPEN = 8
"""Most indexes that a thread has open: each uses two or three of the 1,024 files that a process may open."""
_TABLES = ("meta", "rows", "heads", "names", "token_rows")
"""All tables but `texts`, which is emptied in another way."""


@dataclass(frozen=True)
class Indexed:
    number: int
    columns: list[Any]
    """In the order of `COLUMNS`."""
    heads: tuple[str, str]
    texts: tuple[str, str]
    """The beginnings of prompt and response."""
    components: dict[str, float]


def indexed(row_number: int, start: int, line: bytes) -> Indexed | None:
    """Convert a line of samples.jsonl for the index; None if it is not a row. Rows of older runs lack fields."""
    row = parsed(line)
    if not row:
        return None
    response = said(row.get("response"))
    searched = response[:SEARCHED]
    rewards = [r for r in map(number, listed(row.get("group_rewards"))) if r is not None]
    own = row.get("components")
    components = {text(k) or "": number(v) for k, v in own.items()} if isinstance(own, Mapping) else {}
    values = {name: _CONVERTED[kind.partition(" ")[0]](row.get(name)) for name, kind in COLUMNS.items()}
    values |= {name: default for name, default in _DEFAULTS.items() if values[name] is None}
    values |= {"id": row_number, "start": start, "bytes": len(line)}
    values |= {"digits": 1 - len(searched.translate(_NO_DIGITS)) / len(searched) if searched else None}
    if rewards:
        values |= {"group_mean": sum(rewards) / len(rewards), "spread": max(rewards) - min(rewards)}
    if values["length"] is None and isinstance(row.get("token_ids"), list):
        values["length"] = len(row["token_ids"])
    if "correct" not in row:
        values["correct"] = components.get("correct", components.get("success"))
    kept = [(name, value) for name, value in components.items() if value is not None][:MOST_COMPONENTS]
    return Indexed(
        row_number,
        [values[name] for name in COLUMNS],
        (_ends(said(row.get("prompt"), last=True)), response[:HEAD]),
        (said(row.get("prompt"))[:SEARCHED], searched),
        dict(kept),
    )


def _ends(prompt: str) -> str:
    """Return the beginning and end of a long prompt: prompts often begin alike and differ at the end."""
    return prompt if len(prompt) <= HEAD else f"{prompt[: HEAD // 2]} … {prompt[-HEAD // 2 :]}"


class _Opened(threading.local):
    """Connections opened by this thread, the most recently used last."""

    def __init__(self) -> None:
        self.connections: dict[SampleIndex, sqlite3.Connection] = {}


_opened = _Opened()


class SampleIndex:
    """The index of one run folder. Thread-safe; each thread has its own connection."""

    def __init__(self, run: Path, cache: Path | None = None) -> None:
        self._run, self._file = run, run / "samples.jsonl"
        # The machine is part of the name: in a networked home folder two machines cannot share SQLite's memory.
        key = hashlib.sha256(f"{FORMAT}:{platform.node()}:{run.resolve()}".encode()).hexdigest()[:24]
        self._path = (cache or cache_folder()) / f"{key}.sqlite"
        self._following = threading.Lock()
        self._seen: object = None
        """State of the files when everything was indexed."""

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection, closing that of its least recently used index if too many are open."""
        known = _opened.connections
        connection = known.pop(self, None) or _open(self._path)
        known[self] = connection
        if len(known) > OPEN:
            next(iter(known)).close()
        return connection

    def close(self) -> None:
        """Close this thread's connection."""
        if connection := _opened.connections.pop(self, None):
            connection.close()

    def all(self, query: str, *parameters: Any) -> list[Any]:
        """Return the rows of a query, or just the values if it has one column."""
        rows = self.connection().execute(query, parameters).fetchall()
        return [row[0] for row in rows] if rows and len(rows[0]) == 1 else rows

    def follow(self, seconds: float = math.inf) -> bool:
        """Index what is new, for about this long; return whether nothing is left. Wait as long for another thread or
        process that is indexing."""
        rescored = sorted((self._run / "rescored").glob("*.jsonl"))
        state = [file_state(path) for path in (self._file, self._run / "tokens", *rescored)]
        if state == self._seen:
            return True
        deadline = time.monotonic() + seconds
        if not self._following.acquire(timeout=-1 if math.isinf(seconds) else seconds):
            return False
        try:
            connection = self.connection()
            while not self._next_batch(connection, deadline):
                if time.monotonic() > deadline:
                    return False
            self._follow_tokens(connection)
            self._follow_rescored(connection, rescored)
            self._seen = state
            return True
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            return False
        finally:
            self._following.release()

    def _next_batch(self, connection: sqlite3.Connection, deadline: float) -> bool:
        """Index some rows; return whether they were the last."""
        with _transaction(connection, deadline):
            read = read_on(self._file, Position(*_get(connection, "position", Position())))
            if read.restarted:
                for name in _TABLES:
                    connection.execute(f"DELETE FROM {name}")
                connection.execute("INSERT INTO texts (texts) VALUES ('delete-all')")
            first = read.position.number - len(read.lines)
            made = (indexed(first + i, start, line) for i, (start, line) in enumerate(read.lines))
            rows = [row for row in made if row is not None]
            insert = connection.executemany
            own = {name: _column(connection, f"component:{name}") for name in {n for r in rows for n in r.components}}
            kept = {name: column for name, column in own.items() if column}
            columns = [f'"{name}"' for name in COLUMNS] + list(kept.values())
            insert(
                f"INSERT INTO rows ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                ([*row.columns, *map(row.components.get, kept)] for row in rows),
            )
            insert("INSERT INTO heads VALUES (?, ?, ?)", ((row.number, *row.heads) for row in rows))
            insert("INSERT INTO texts (rowid, prompt, response) VALUES (?, ?, ?)", ((r.number, *r.texts) for r in rows))
            _set(connection, "position", read.position)
            return read.at_end

    def _follow_tokens(self, connection: sqlite3.Connection) -> None:
        """Update which samples have token signals; removed files no longer count."""
        files = {path.name: path for path in (self._run / "tokens").glob("step_*.parquet")}
        known = set(_get(connection, "token_files", []))
        if known == files.keys():
            return
        with _transaction(connection):
            for name in known - files.keys():
                connection.execute("DELETE FROM token_rows WHERE step = ?", (_step(name),))
            for name in files.keys() - known:
                rows = [(_step(name), group, sample) for group, sample in samples_in(files[name])]
                connection.executemany("INSERT OR IGNORE INTO token_rows VALUES (?, ?, ?)", rows)
            _set(connection, "token_files", sorted(files))

    def _follow_rescored(self, connection: sqlite3.Connection, paths: list[Path]) -> None:
        """Update the rewards of rescored/NAME.jsonl, which are reread when a file has changed."""
        files = {path.stem: path for path in paths}
        states = {name: file_state(path) for name, path in files.items()}
        known = _get(connection, "rescored_files", {})
        if known == states:
            return
        with _transaction(connection):
            rows = connection.execute("SELECT id, step, group_id, sample FROM rows")
            place = {(step, group, sample): row for row, step, group, sample in rows}
            for name in (name for name in states | known if states.get(name) != known.get(name)):
                if column := _column(connection, f"rescored:{name}"):
                    connection.execute(f"UPDATE rows SET {column} = NULL")
                    if name in files:
                        values = _rescored(files[name], place)
                        connection.executemany(f"UPDATE rows SET {column} = ? WHERE id = ?", values)
                    else:
                        connection.execute("DELETE FROM names WHERE name = ?", (f"rescored:{name}",))
            _set(connection, "rescored_files", states)

    def names(self) -> dict[str, dict[str, str]]:
        """Return `component` and `rescored` -> name of the reward -> its column in `rows`."""
        known: dict[str, dict[str, str]] = {"component": {}, "rescored": {}}
        for key, name in self.all("SELECT key, name FROM names ORDER BY name"):
            family, _, own = name.partition(":")
            known[family][own] = f"x{key}"
        return known

    def raw(self, row: int) -> dict[str, Any] | None:
        """Return a row of samples.jsonl as it is; None if there is no such row (any more)."""
        for start, size in self.all("SELECT start, bytes FROM rows WHERE id = ?", row):
            with self._file.open("rb") as file:
                file.seek(start)
                return parsed(file.read(size)) or None  # None: truncated since
        return None


def cache_folder() -> Path:
    """Return `XDG_CACHE_HOME/rlkit/view`, accessible only to this user, or a temporary folder if it is not writable."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlkit" / "view"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="rlkit-view-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in folder.glob("*.sqlite*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > UNUSED_DAYS * 86400:
                file.unlink()
    return folder


def file_state(path: Path) -> list[int] | None:
    """Return a state that changes when the file is written to or replaced; None while it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise
        for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            file.unlink(missing_ok=True)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (
            "journal_mode=WAL", "synchronous=NORMAL", "cache_size=-8192", "temp_store=MEMORY", "mmap_size=1073741824",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")
        path.chmod(0o600)
        if connection.execute("PRAGMA user_version").fetchone() == (0,):
            with _transaction(connection):
                if connection.execute("PRAGMA user_version").fetchone() == (0,):  # no other process was faster
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute("PRAGMA user_version=1")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, deadline: float = math.inf) -> Iterator[None]:
    """Open a write transaction. Raises sqlite3.OperationalError if another writer is busy until the deadline."""
    left = 30.0 if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
    connection.execute(f"PRAGMA busy_timeout={round(1000 * left)}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _column(connection: sqlite3.Connection, name: str) -> str | None:
    """Return the column in `rows` for a name in `names`, created if needed; None if there are too many."""
    limit = "SELECT ? WHERE (SELECT count(*) FROM names) < ?"
    connection.execute(f"INSERT OR IGNORE INTO names (name) {limit}", (name, MOST_NAMES))
    key = connection.execute("SELECT key FROM names WHERE name = ?", (name,)).fetchone()
    if key is None:
        return None
    column = f"x{key[0]}"
    if not connection.execute("SELECT 1 FROM pragma_table_info('rows') WHERE name = ?", (column,)).fetchone():
        connection.execute(f"ALTER TABLE rows ADD COLUMN {column} REAL")
    return column


def _rescored(file: Path, place: Mapping[tuple[int, str, int], int]) -> Iterator[tuple[float, int]]:
    """Yield (reward, row); `place`: (step, group, sample) -> row."""
    with file.open("rb") as lines:
        for row in map(parsed, lines):
            at = place.get((whole(row.get("step")) or 0, str(row.get("group_id")), whole(row.get("sample")) or 0))
            value = number(row.get("reward"))
            if value is not None and at is not None:
                yield value, at


def _step(name: str) -> int:
    digits = name.removeprefix("step_").removesuffix(".parquet")
    return int(digits) if digits.isdecimal() else -1


def _get(connection: sqlite3.Connection, key: str, default: Any) -> Any:
    value = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return default if value is None else json.loads(value[0])


def _set(connection: sqlite3.Connection, key: str, value: Any) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
