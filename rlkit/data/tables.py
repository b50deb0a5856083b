"""Rows of tables: local files (JSON Lines, JSON, CSV, Parquet) by their names, and whatever `datasets` loads.

Light for files: `datasets` is imported only for folders and for names on the hub.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import socket
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlkit.data.base import BadRow, DataError
from rlkit.experience.extras import lacking

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row | BadRow]]
"""`(origin, row)`: the origin is `file.jsonl:12`, counting lines for JSON Lines and rows otherwise."""

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GZIP = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_REACH_SECONDS = 4.0


def local_files(paths: str | Sequence[str], key: str) -> list[Path]:
    """Return the files that match names and patterns (`*.jsonl`), those of a pattern sorted. Raises DataError."""
    files: list[Path] = []
    for name in [paths] if isinstance(paths, str) else paths:
        path = Path(name).expanduser()
        if has_magic(name) and not path.exists():
            matches = sorted(Path(match) for match in glob(str(path)))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not matches:
                raise DataError(f"{key}={name}: no file matches (looked from {Path.cwd()}).")
            files += matches
        else:
            files.append(path)
    for path in files:
        if path.is_dir():
            raise DataError(f"{key}={path} is a folder: name the file in it, or use data=hf for a data set folder.")
        if not path.exists():
            raise DataError(f"{key}={path}: no such file (looked from {Path.cwd()}).")
    if not files:
        raise DataError(f"{key} names no file.")
    return files


def is_local(path: str) -> bool:
    """Whether `path` can only mean a local file, not a folder or a name on the hub."""
    local = Path(path).expanduser()
    if local.exists():
        return local.is_file()
    return has_magic(path) or not _HUB_NAME.fullmatch(path) or "/" not in path or _suffix(local) in SUFFIXES


def file_rows(path: Path, key: str, text_columns: Collection[str] = ()) -> Rows:
    """Yield all rows of one file. `text_columns` (CSV) are read as texts whatever they look like. Raises DataError."""
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows, ".json": _json_rows}
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if not start:
            raise DataError(f"{key}={path} is empty.")
        if start[:2] in _UTF16:
            raise DataError(f"{key}={path} is UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE.")
        suffix = ".parquet" if start == b"PAR1" else _suffix(path)
        if start[:2] == _GZIP and (suffix in readers or path.suffix != ".gz"):
            raise DataError(f"{key}={path} is gzipped, but only .jsonl.gz can be read gzipped: unpack it.")
        if suffix == ".parquet" and start != b"PAR1":
            raise DataError(f"{key}={path} is not a Parquet file.")
        if suffix in readers:
            yield from readers[suffix](path, key, text_columns)
        else:
            yield from _json_lines(path, key)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{key}={path} is not UTF-8 ({error.reason} at byte {error.start}); write it as UTF-8, from Latin-1 for "
            "example: iconv -f LATIN1 -t UTF-8 FILE."
        ) from error
    except OSError as error:
        raise DataError(f"{key}={path} cannot be read: {error}") from error


def table_rows(path: str, key: str, split: str, subset: str | None = None) -> Rows:
    """Yield the rows of local files, or of a `split` that `datasets` loads. Raises DataError."""
    if is_local(path):
        for file in local_files(path, key):
            yield from file_rows(file, key)
    else:
        yield from data_set_rows(path, key, split, subset)


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _json_lines(path: Path, key: str) -> Rows:
    number, objects, first = 0, 0, None
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                origin = f"{path.name}:{number}"
                row = _json_row(origin, line)
                if isinstance(row, BadRow):
                    first = first or row
                    if row.reason.startswith("a JSON list over"):
                        raise DataError(f"{key}={path}: {row.reason}. A file that is one list must be named .json.")
                objects += not isinstance(row, BadRow)
                yield origin, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{key}={path} cannot be read after line {number}: {error}") from error
    if not objects:
        why = f"; the first: {first.origin}: {first.reason}" if first else ": it has only blank lines"
        beginning = _first_line(path) if first else ""
        plain = "," in beginning and beginning.isprintable() and beginning.lstrip()[:1] not in "[{"
        csv_like = " A CSV file's name must end in .csv." if plain else ""
        raise DataError(f"{key}={path} has no line that is a JSON object{why}.{csv_like}")


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\r\n")


def _json_row(origin: str, line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(origin, f"not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):
            return BadRow(origin, "a JSON list over several lines, not an object per line")
        return BadRow(origin, f"broken JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}")
    except RecursionError:
        return BadRow(origin, "broken JSON: nested too deeply")
    return row if isinstance(row, dict) else BadRow(origin, f"{_kind(row)}, not an object with columns")


def _kind(value: Any) -> str:
    return "a JSON list" if isinstance(value, list) else f"a JSON {type(value).__name__}"


def _json_rows(path: Path, key: str, _: Collection[str]) -> Rows:
    """Yield the rows of a list of objects, or of JSON Lines in a file named .json."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, key)
            return
        raise DataError(f"{key}={path}: broken JSON: {error.msg} at line {error.lineno}.") from error
    if isinstance(items, dict):
        lists = [name for name, value in items.items() if isinstance(value, list)]
        if len(lists) != 1:
            items = [items]
        else:  # {"data": [...]}
            items = items[lists[0]]
    if not isinstance(items, list):
        raise DataError(f"{key}={path} is {_kind(items)}, not a list of objects.")
    for number, row in enumerate(items, start=1):
        origin = f"{path.name}:{number}"
        yield origin, row if isinstance(row, dict) else BadRow(origin, f"{_kind(row)}, not an object with columns")


def _csv_rows(path: Path, key: str, text_columns: Collection[str]) -> Rows:
    from pyarrow import ArrowInvalid, string
    from pyarrow import csv as arrow

    broken: list[tuple[int | None, str]] = []

    def note(row: Any) -> str:
        broken.append((row.number, f"{row.actual_columns} fields, where the header has {row.expected_columns}"))
        return "skip"

    try:
        table = arrow.read_csv(
            path,
            read_options=arrow.ReadOptions(use_threads=False),
            parse_options=arrow.ParseOptions(
                delimiter=_delimiter(path), newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=arrow.ConvertOptions(column_types=dict.fromkeys(text_columns, string())),
        )
    except ArrowInvalid as error:
        raise DataError(f"{key}={path} is not a CSV file that can be read: {error}") from error
    for number, reason in broken:
        origin = path.name if number is None else f"{path.name}:{number}"
        yield origin, BadRow(origin, reason)
    yield from _numbered(path, table.to_batches())


def _delimiter(path: Path) -> str:
    """Return the delimiter: a tab for .tsv, else the comma unless the header has only another one."""
    if path.suffix == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines), [""])
    return next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), ",")


def _parquet_rows(path: Path, key: str, _: Collection[str]) -> Rows:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        yield from _numbered(path, ParquetFile(path).iter_batches(batch_size=4096))
    except ArrowException as error:
        raise DataError(f"{key}={path} is not a Parquet file that can be read: {error}") from error


def _numbered(path: Path, batches: Any) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path.name}:{number}", row


# -- what `datasets` loads ---------------------------------------------------------------------------------------------


def data_set_rows(
    path: str, key: str, split: str, subset: str | None = None, revision: str | None = None, *, head: bool = False
) -> Rows:
    """Yield the rows of a folder or of a data set on the hub. `head`: read rows only as needed. Raises DataError."""
    origin = f"{Path(path).name if Path(path).expanduser().exists() else path}[{split}]"
    for number, row in enumerate(_data_set(path, key, split, subset, revision, head), start=1):
        yield f"{origin}:{number}", row


def hub_columns(path: str, key: str, subset: str | None, revision: str | None) -> list[str] | None:
    """Return the column names without downloading rows; None if that is impossible. Raises DataError."""
    datasets = _datasets(path, key)
    _reach_hub(path, key)
    try:
        info = datasets.load_dataset_builder(path, subset, revision=revision).info
    except Exception as error:  # `datasets` raises whatever its readers raise; the user needs path and cause
        if _offline():
            raise DataError(f"{key}={path} is not in the cache, and HF_HUB_OFFLINE is set. {_fetch(path)}.") from error
        raise DataError(f"{key}={path} cannot be loaded: {_one_line(error)}") from error
    return None if info.features is None else list(info.features)


def _data_set(path: str, key: str, split: str, subset: str | None, revision: str | None, head: bool) -> Any:
    local = Path(path).expanduser()
    if not local.exists() and (path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(path)):
        raise DataError(f"{key}={path}: no such file or folder (looked from {Path.cwd()}).")
    datasets = _datasets(path, key)
    if not local.exists():
        _reach_hub(path, key)
    try:
        if not local.exists():
            return datasets.load_dataset(path, subset, split=split, revision=revision)
        if not ((local / "dataset_dict.json").exists() or (local / "state.json").exists()):
            return datasets.load_dataset(str(local), subset, split=split, streaming=head)
        saved = datasets.load_from_disk(str(local))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise DataError(f"{key}={path} has no split {split!r}; it has {', '.join(saved)}.")
        return saved[split]
    except DataError:
        raise
    except Exception as error:  # as above
        if not local.exists() and _offline():
            raise DataError(f"{key}={path} is not in the cache, and HF_HUB_OFFLINE is set. {_fetch(path)}.") from error
        raise DataError(f"{key}={path}, split {split!r}, cannot be loaded: {_one_line(error)}") from error


def _datasets(path: str, key: str) -> Any:
    for message in lacking("datasets", "hf"):
        raise DataError(f"{key}={path}: {message}")
    import datasets

    return datasets


def _reach_hub(path: str, key: str) -> None:
    """Check that the hub can be reached; otherwise `datasets` retries for a minute. With HF_HUB_OFFLINE=1 it loads from
    its cache."""
    if _offline():
        return
    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # our own connection would bypass the proxy
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise DataError(
            f"{key}={path} is not a file or folder here (looked from {Path.cwd()}), and {address.hostname} cannot be "
            f"reached ({error}). {_fetch(path)}, or set HF_HUB_OFFLINE=1 if it is in the cache."
        ) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def _fetch(path: str) -> str:
    command = f"hf download {path} --repo-type dataset --local-dir FOLDER"
    return f"Fetch it where there is a network ({command}) and name the folder"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
