"""Problems from a user's own data: a JSON Lines file, or anything that `datasets` can load."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from rlkit.data.base import BadRow, DataConfig, DataError, DataSource, Problem, Split
from rlkit.data.rows import (
    ColumnsConfig,
    heldout_keys,
    missing_columns,
    parse_rows,
    question_key,
    refuse_too_many_bad_rows,
)

Row = Mapping[str, Any]
Loaded = tuple[list[Problem], list[BadRow]]

_DEFAULT_HELDOUT_SHARE = 0.05
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TableSource(DataSource):
    """Rows with columns, split into train and held-out problems that share no question."""

    Config: ClassVar[type[DataConfig]] = ColumnsConfig

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._loaded: dict[Split, Loaded] | None = None

    @abstractmethod
    def _source(self, split: Split) -> str | None:
        """Name of the file or data set with a split's rows; None if the held-out ones are a share of the others."""

    @abstractmethod
    def _rows(self, split: Split) -> Iterator[tuple[str, Row | BadRow]]:
        """`(origin, row)` for all rows of a split. Raises DataError if they cannot be read."""

    @abstractmethod
    def _columns(self, split: Split) -> list[str] | None:
        """Column names, read cheaply; None if that is not possible. Raises DataError like `_rows`."""

    def check(self) -> list[str]:
        messages: list[str] = []
        for split in ("train", "heldout"):
            source = self._source(split)
            if source is None:
                continue
            try:
                columns = self._columns(split)
            except DataError as error:
                messages.append(str(error))
                continue
            if columns is not None:
                messages += missing_columns(self.config, columns, source)
        return messages

    def provides(self) -> frozenset[str]:
        config: ColumnsConfig = self.config
        try:
            columns = set(self._columns("train") or ())
        except DataError:
            columns = set()  # check() reports why
        provided = columns - set(config.named_columns().values())
        if config.answer_column is not None:
            provided.add("answer")
        if config.reference_columns or config.answer_column is not None:
            provided.add("references")
        return frozenset(provided)

    def load(self, split: Split) -> Loaded:
        if self._loaded is None:
            self._loaded = self._load_both()
        return self._loaded[split]

    def _load_both(self) -> dict[Split, Loaded]:
        train, bad = self._parse("train")
        if self._source("heldout") is None:
            kept, heldout = self._split(train)
            return {"train": (kept, bad), "heldout": (heldout, [])}
        heldout, heldout_bad = self._parse("heldout", id_prefix="heldout/")
        judged = {question_key(problem): problem.origin for problem in heldout}
        kept = [problem for problem in train if question_key(problem) not in judged]
        bad = bad + [
            BadRow(problem.origin, f"held out: {judged[question_key(problem)]} asks the same")
            for problem in train
            if question_key(problem) in judged
        ]
        self._refuse("train", kept, bad)
        return {"train": (kept, bad), "heldout": (heldout, heldout_bad)}

    def _parse(self, split: Split, id_prefix: str = "") -> Loaded:
        problems, bad = parse_rows(self._rows(split), self.config, id_prefix)
        self._refuse(split, problems, bad)
        return problems, bad

    def _refuse(self, split: Split, problems: list[Problem], bad: list[BadRow]) -> None:
        what = self._source(split) or ""
        refuse_too_many_bad_rows(bad, len(problems) + len(bad), self.config.max_bad_row_share, what)

    def _split(self, problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
        """By question: duplicates of a question land on one side, whatever the order of the file."""
        config: ColumnsConfig = self.config
        keys = {question_key(problem) for problem in problems}
        if len(keys) < 2:
            raise DataError(
                f"{self._source('train')} has one question only, so none can be held out: name held-out data "
                "with data.heldout_path."
            )
        share = _DEFAULT_HELDOUT_SHARE if config.heldout_share is None else config.heldout_share
        chosen = heldout_keys(keys, share, config.heldout_seed)
        kept = [problem for problem in problems if question_key(problem) not in chosen]
        return kept, [problem for problem in problems if question_key(problem) in chosen]


class JsonlConfig(ColumnsConfig):
    """A JSON Lines file (`.jsonl`, or `.jsonl.gz`): one object per line."""

    path: str
    """File with the training problems."""
    heldout_path: str | None = None
    """File with the held-out problems; null: a share of `path` (`heldout_share`)."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> JsonlConfig:
        if self.heldout_path is not None and self.heldout_share is not None:
            raise ValueError("heldout_share has no effect with heldout_path: set one of them")
        return self


class JsonlSource(TableSource):
    """`data=jsonl data.path=train.jsonl`: GSM8K's own files need no other key."""

    Config: ClassVar[type[DataConfig]] = JsonlConfig

    def _path(self, split: Split) -> Path | None:
        name = self.config.path if split == "train" else self.config.heldout_path
        return None if name is None else Path(name).expanduser()

    def _source(self, split: Split) -> str | None:
        path = self._path(split)
        return None if path is None else str(path)

    def _rows(self, split: Split) -> Iterator[tuple[str, Row | BadRow]]:
        path = self._path(split)
        assert path is not None
        key = "data.path" if split == "train" else "data.heldout_path"
        if path.is_dir():
            raise DataError(f"{key}={path} is a folder: name the file in it, or use data=hf for a data set folder.")
        yield from json_lines(path, key)

    def _columns(self, split: Split) -> list[str] | None:
        for _, row in self._rows(split):
            if not isinstance(row, BadRow):
                return list(row)
            if row.reason.startswith("a JSON list"):
                raise DataError(f"{self._source(split)}: {row.reason}. For a file that is one list, use data=hf.")
        raise DataError(f"{self._source(split)} has no line that is a JSON object.")


def json_lines(path: Path, key: str) -> Iterator[tuple[str, Row | BadRow]]:
    """`(origin, row)` for every line of a JSON Lines file (`.gz` too). Raises DataError, which names the key."""
    if not path.exists():
        raise DataError(f"{key}={path}: no such file (looked from {Path.cwd()}).")
    if path.is_dir():
        raise DataError(f"{key}={path} is a folder: name the file in it.")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    origin = f"{path.name}:{number}"
                    yield origin, _json_row(origin, line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{key}={path} cannot be read after line {number}: {error}") from error


def _json_row(origin: str, line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(origin, f"not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):
            return BadRow(origin, "a JSON list over several lines, not an object per line")
        return BadRow(origin, f"broken JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return BadRow(origin, "broken JSON: nested too deeply")
    if isinstance(row, dict):
        return row
    kind = {"list": "a JSON list"}.get(type(row).__name__, f"a JSON {type(row).__name__}")
    return BadRow(origin, f"{kind}, not an object with columns")


class HfConfig(ColumnsConfig):
    """A data set of the Hugging Face hub, or a local folder or file (parquet, csv, json) that `datasets` reads."""

    path: str
    """Name on the hub, or a local folder or file."""
    subset: str | None = None
    """Configuration of the data set (`main` of `openai/gsm8k`)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit makes runs repeatable."""
    split: str = "train"
    """Split with the training problems (`datasets` slices such as `train[:1000]` work)."""
    heldout_split: str | None = None
    """Split with the held-out problems."""
    heldout_path: str | None = None
    """Local file with the held-out problems, if they are not a split of `path`."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> HfConfig:
        ways = ("heldout_split", "heldout_path", "heldout_share")
        named = [way for way in ways if getattr(self, way) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other: set one of them")
        if self.revision is not None and Path(self.path).expanduser().exists():
            raise ValueError(f"revision has no effect on local data ({self.path})")
        return self


class HfSource(TableSource):
    """`data=hf data.path=openai/gsm8k data.subset=main data.heldout_split=test`. Never runs a data set's code."""

    Config: ClassVar[type[DataConfig]] = HfConfig

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._known_columns: dict[tuple[str, str], list[str] | None] = {}

    def _where(self, split: Split) -> tuple[str, str] | None:
        config: HfConfig = self.config
        if split == "train":
            return config.path, config.split
        if config.heldout_path is not None:
            return config.heldout_path, "train"  # the name `datasets` gives to the rows of a single file
        return None if config.heldout_split is None else (config.path, config.heldout_split)

    def _source(self, split: Split) -> str | None:
        where = self._where(split)
        return None if where is None else _name(*where)

    def _rows(self, split: Split) -> Iterator[tuple[str, Row | BadRow]]:
        where = self._where(split)
        assert where is not None
        path, name = where
        origin = _name(Path(path).name if Path(path).expanduser().exists() else path, name)
        for number, row in enumerate(open_table(path, name, self.config.subset, self.config.revision), start=1):
            yield f"{origin}:{number}", row

    def _columns(self, split: Split) -> list[str] | None:
        where = self._where(split)
        assert where is not None
        if where not in self._known_columns:
            columns = _file_columns(Path(where[0]).expanduser())
            self._known_columns[where] = columns or open_table(
                *where, self.config.subset, self.config.revision, columns_only=True
            )
        return self._known_columns[where]


def open_table(
    path: str, split: str, subset: str | None = None, revision: str | None = None, columns_only: bool = False
) -> Any:
    """Rows that `datasets` loads from a file, a folder or the hub. Raises DataError.

    `columns_only`: column names, read cheaply; None if only a download would tell.
    """
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or local.suffix in _BUILDERS
    if not local.exists() and (looks_local or not _HUB_NAME.fullmatch(path)):
        raise DataError(f"data.path={path}: no such file or folder (looked from {Path.cwd()}).")
    import datasets

    try:
        if not local.exists():
            return _open_hub(path, split, subset, revision, columns_only)
        if local.is_file():
            if local.suffix not in _BUILDERS:
                raise DataError(f"{path}: files must end in {', '.join(_BUILDERS)}, not {local.suffix!r}.")
            options = {"sep": "\t"} if local.suffix == ".tsv" else {}
            builder = _BUILDERS[local.suffix]
            rows = datasets.load_dataset(builder, data_files=str(local), split=split, streaming=columns_only, **options)
        elif (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            saved = datasets.load_from_disk(str(local))
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(str(local), subset, split=split, streaming=columns_only)
        return list(next(iter(rows), {})) if columns_only else rows
    except DataError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers raise: the user needs path and cause
        raise DataError(f"data.path={path}, split {split!r}, cannot be loaded: {_one_line(error)}") from error


def _open_hub(path: str, split: str, subset: str | None, revision: str | None, columns_only: bool) -> Any:
    import datasets

    if columns_only:
        info = datasets.load_dataset_builder(path, subset, revision=revision).info
        return None if info.features is None else list(info.features)
    return datasets.load_dataset(path, subset, split=split, revision=revision)


def table_rows(path: str, key: str, split: str, subset: str | None = None) -> Iterator[tuple[str, Row | BadRow]]:
    """`(origin, row)` of a JSON Lines file, or of a `split` that `datasets` loads. Raises DataError."""
    local = Path(path).expanduser()
    if not needs_datasets(path):
        yield from json_lines(local, key)
        return
    split = "train" if local.is_file() else split  # the name `datasets` gives to the rows of a single file
    origin = _name(local.name if local.exists() else path, split)
    for number, row in enumerate(open_table(path, split, subset), start=1):
        yield f"{origin}:{number}", row


def needs_datasets(path: str) -> bool:
    """Whether `path` is a Parquet file or a folder, or, if nothing exists there, could be a name on the hub."""
    local = Path(path).expanduser()
    if local.exists():
        return local.is_dir() or local.suffix == ".parquet"
    return "/" in path and bool(_HUB_NAME.fullmatch(path)) and local.suffix not in (*_BUILDERS, ".gz")


def _name(path: str, split: str) -> str:
    """A file by its name alone; a data set by name and split."""
    return path if Path(path).suffix in _BUILDERS else f"{path}[{split}]"


def _file_columns(path: Path) -> list[str] | None:
    """Columns of a plain local file without the slow import of `datasets`; None if only `datasets` can tell."""
    if not path.is_file():
        return None
    try:
        if path.suffix == ".parquet":
            from pyarrow import ArrowException
            from pyarrow.parquet import read_schema

            try:
                return list(read_schema(path).names)
            except ArrowException as error:
                raise DataError(f"{path} is not a parquet file: {error}") from error
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if path.suffix in (".csv", ".tsv"):
                return next(csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ","), None)
            first = json.loads(next(lines, ""))
            return list(first) if isinstance(first, dict) else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError:
        return None  # one JSON value over several lines


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"
