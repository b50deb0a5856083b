"""samples.jsonl as a SQLite table: numbers, names, first characters, full text, and where each row begins in the file.

The table lies in a cache folder outside of the run, so runs may be read-only. It follows the file by byte offset.
Several processes may follow the same run: a batch of rows and the offset behind it are one transaction.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkit.view.lines import Position, read_on
from rlkit.view.rows import COLUMNS, Indexed, indexed, number, parsed, whole

FORMAT = 2
"""Another one in a cache file: it is made anew."""
UNUSED_DAYS = 30
"""After which the cache of a run is removed."""
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows ({", ".join(f'"{name}" {kind}' for name, kind in COLUMNS.items())});
CREATE INDEX IF NOT EXISTS rows_of_group ON rows (step, group_id, sample);
CREATE INDEX IF NOT EXISTS rows_of_prompt ON rows (prompt_id);
CREATE TABLE IF NOT EXISTS heads (id INTEGER PRIMARY KEY, prompt TEXT, response TEXT);
CREATE TABLE IF NOT EXISTS names (key INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS extra (name INTEGER, id INTEGER, value REAL, PRIMARY KEY (name, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS token_rows (step INTEGER, group_id TEXT, sample INTEGER,
    PRIMARY KEY (step, group_id, sample)) WITHOUT ROWID;
CREATE VIRTUAL TABLE IF NOT EXISTS texts USING fts5 (prompt, response, content='', tokenize='unicode61');
"""
_TABLES = ("meta", "rows", "heads", "names", "extra", "token_rows", "texts")


class SampleIndex:
    """Of one run folder. Safe in threads; each has its own connection."""

    def __init__(self, run: Path, cache: Path | None = None) -> None:
        self._run, self._file = run, run / "samples.jsonl"
        self._path = (cache or cache_folder()) / f"{_key(run)}.sqlite"
        self._local = threading.local()
        self._following = threading.Lock()
        self._seen: object = None
        """What the files were when all was indexed."""

    def connection(self) -> sqlite3.Connection:
        """This thread's. Rows have names."""
        if not hasattr(self._local, "connection"):
            self._local.connection = _open(self._path)
        connection: sqlite3.Connection = self._local.connection
        return connection

    def follow(self, seconds: float = math.inf) -> bool:
        """Index what is new, for about that long; return whether nothing is left. Another thread or process that is
        at it is waited for, as long."""
        state = _state(self._run)
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
            self._follow_rescored(connection)
            self._seen = state
            return True
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            return False
        finally:
            self._following.release()

    def _next_batch(self, connection: sqlite3.Connection, deadline: float) -> bool:
        """Index some rows; return whether these were the last."""
        with _transaction(connection, deadline):
            read = read_on(self._file, _position(connection))
            if read.restarted:
                _empty(connection)
            first = read.position.number - len(read.lines)
            rows = (indexed(first + i, start, line) for i, (start, line) in enumerate(read.lines))
            _insert(connection, [row for row in rows if row is not None])
            position = read.position
            _set(connection, "position", json.dumps([position.offset, position.number, position.check]))
            return read.at_end

    def _follow_tokens(self, connection: sqlite3.Connection) -> None:
        """Which samples have token signals. Thinned steps lose theirs."""
        files = {path.name: path for path in (self._run / "tokens").glob("step_*.parquet")}
        known = set(json.loads(_get(connection, "token_files", "[]")))
        if known == set(files):
            return
        with _transaction(connection):
            for name in known - set(files):
                connection.execute("DELETE FROM token_rows WHERE step = ?", (_step(name),))
            for name in sorted(set(files) - known):
                from rlkit.view.tokens import samples_in

                rows = [(_step(name), group, sample) for group, sample in samples_in(files[name])]
                connection.executemany("INSERT OR IGNORE INTO token_rows VALUES (?, ?, ?)", rows)
            _set(connection, "token_files", json.dumps(sorted(files)))

    def _follow_rescored(self, connection: sqlite3.Connection) -> None:
        """The rewards of rescored/NAME.jsonl, read anew when a file has changed."""
        files = {path.stem: path for path in (self._run / "rescored").glob("*.jsonl")}
        states = {name: _file_state(path) for name, path in files.items()}
        known = json.loads(_get(connection, "rescored_files", "{}"))
        changed = [name for name in states | known if states.get(name) != known.get(name)]
        if not changed:
            return
        with _transaction(connection):
            rows = connection.execute("SELECT id, step, group_id, sample FROM rows").fetchall()
            place = {(step, group, sample): row for row, step, group, sample in rows}
            for name in changed:
                key = _name(connection, f"rescored:{name}")
                connection.execute("DELETE FROM extra WHERE name = ?", (key,))
                if name not in files:
                    connection.execute("DELETE FROM names WHERE key = ?", (key,))
                    continue
                values = _rescored(files[name], place)
                connection.executemany("INSERT OR REPLACE INTO extra VALUES (?, ?, ?)", ((key, *v) for v in values))
            _set(connection, "rescored_files", json.dumps(states))

    def names(self) -> dict[str, list[str]]:
        """Of the `component`s and of the `rescored` rewards."""
        found: dict[str, list[str]] = {"component": [], "rescored": []}
        for (name,) in self.connection().execute("SELECT name FROM names ORDER BY name"):
            family, _, own = name.partition(":")
            found[family].append(own)
        return found

    def raw(self, row: int) -> dict[str, Any] | None:
        """A row of samples.jsonl as it is; None if there is no such row (any more)."""
        place = self.connection().execute("SELECT start, bytes FROM rows WHERE id = ?", (row,)).fetchone()
        if place is None:
            return None
        with self._file.open("rb") as file:
            file.seek(place[0])
            return parsed(file.read(place[1])) or None  # none: cut since

    def close(self) -> None:
        """Of this thread."""
        if hasattr(self._local, "connection"):
            self._local.connection.close()
            del self._local.connection


def cache_folder() -> Path:
    """`XDG_CACHE_HOME/rlkit/view`, for this user alone; a temporary folder where nothing can be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "rlkit" / "view"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return _temporary_folder()
    _remove_unused(folder)
    return folder


def _temporary_folder() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="rlkit-view-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _remove_unused(folder: Path) -> None:
    for file in folder.glob("*.sqlite*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > UNUSED_DAYS * 86400:
                file.unlink()


def _key(run: Path) -> str:
    """The machine is part of it: a home folder on a network is no place for the shared memory of two."""
    return hashlib.sha256(f"{platform.node()}:{run.resolve()}".encode()).hexdigest()[:24]


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
        connection.execute("PRAGMA journal_mode=WAL")
        for pragma in ("synchronous=NORMAL", "cache_size=-8192", "temp_store=MEMORY", "mmap_size=1073741824"):
            connection.execute(f"PRAGMA {pragma}")
        path.chmod(0o600)
        if _version(connection) != FORMAT:
            with _transaction(connection):
                if _version(connection) != FORMAT:  # nobody else was faster
                    for name in _TABLES:
                        connection.execute(f"DROP TABLE IF EXISTS {name}")
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={FORMAT}")
    except BaseException:
        connection.close()
        raise
    return connection


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, deadline: float = math.inf) -> Iterator[None]:
    """Of a writer; raises sqlite3.OperationalError if another one is at it until the deadline."""
    left = 30.0 if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
    connection.execute(f"PRAGMA busy_timeout={round(1000 * left)}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _insert(connection: sqlite3.Connection, rows: Sequence[Indexed]) -> None:
    places = ", ".join("?" * len(COLUMNS))
    connection.executemany(f"INSERT INTO rows VALUES ({places})", (row.columns for row in rows))
    connection.executemany("INSERT INTO heads VALUES (?, ?, ?)", (row.heads for row in rows))
    connection.executemany("INSERT INTO texts (rowid, prompt, response) VALUES (?, ?, ?)", (row.texts for row in rows))
    keys = {name: _name(connection, f"component:{name}") for name in {name for row in rows for name in row.components}}
    values = ((keys[name], row.number, value) for row in rows for name, value in row.components.items())
    connection.executemany("INSERT INTO extra VALUES (?, ?, ?)", values)


def _name(connection: sqlite3.Connection, name: str) -> int:
    connection.execute("INSERT OR IGNORE INTO names (name) VALUES (?)", (name,))
    key: int = connection.execute("SELECT key FROM names WHERE name = ?", (name,)).fetchone()[0]
    return key


def _rescored(file: Path, place: Mapping[tuple[int, str, int], int]) -> Iterator[tuple[int, float]]:
    """(row, reward); `place` says which row has a (step, group, sample)."""
    with file.open("rb") as lines:
        for line in lines:
            row = parsed(line)
            at = place.get((whole(row.get("step")) or 0, str(row.get("group_id")), whole(row.get("sample")) or 0))
            value = number(row.get("reward"))
            if value is not None and at is not None:
                yield at, value


def _step(name: str) -> int:
    digits = name.removeprefix("step_").removesuffix(".parquet")
    return int(digits) if digits.isdecimal() else -1


def _empty(connection: sqlite3.Connection) -> None:
    for name in _TABLES[:-1]:
        connection.execute(f"DELETE FROM {name}")
    connection.execute("INSERT INTO texts (texts) VALUES ('delete-all')")


def _position(connection: sqlite3.Connection) -> Position:
    return Position(*json.loads(_get(connection, "position", '[0, 0, ""]')))


def _get(connection: sqlite3.Connection, key: str, default: str) -> str:
    value = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return default if value is None else value[0]


def _set(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _state(run: Path) -> object:
    rescored = sorted((run / "rescored").glob("*.jsonl"))
    folder = run / "tokens"
    return _file_state(run / "samples.jsonl"), _file_state(folder), [_file_state(file) for file in rescored]


def _file_state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]
