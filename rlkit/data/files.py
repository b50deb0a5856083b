"""Problems from the user's data: files (JSON Lines, JSON, CSV, Parquet), or anything that `datasets` can load."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import model_validator

from rlkit.data.base import BadRow, DataConfig, DataError, DataSource, Problem, Split
from rlkit.data.cells import Row, prompt_of
from rlkit.data.rows import (
    ColumnsConfig,
    Parts,
    RowsConfig,
    digest,
    first_rows,
    held_out,
    missing_columns,
    parse_rows,
    question_key,
    refuse_too_many_bad_rows,
)
from rlkit.data.stored import picked
from rlkit.data.tables import Rows, data_set_rows, file_rows, hub_columns, is_local, local_files

Loaded = tuple[Sequence[Problem], list[BadRow]]

CHECKED_ROWS = 10_000
"""Rows of each split that are checked before a run starts; the others are checked when they are loaded."""
PROVIDED = frozenset({"answer", "references", "responses", "pairs", "labels"})
"""Words in `provides` that are not columns, even if a column has that name."""
DEFAULT_HELDOUT_SHARE = 0.05


class TableSource(DataSource):
    """Rows with columns, split into train and held-out problems that share no question."""

    Config: ClassVar[type[DataConfig]] = ColumnsConfig
    gather: ClassVar[bool] = False
    """Whether rows with the same prompt form one problem."""

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._loaded: dict[Split, Loaded] | None = None
        self._heads: dict[Split, list[tuple[str, Row | BadRow]]] = {}
        self._judged: dict[Split, Loaded] = {}
        """Problems and unusable rows among the first rows."""
        self._noted: dict[str, tuple[int, str]] = {}
        """What is done with some of the used rows -> how many, and the first."""

    @abstractmethod
    def _source(self, split: Split) -> str | None:
        """Name the files or data set with a split's rows; None if the held-out rows are a share of the others."""

    @abstractmethod
    def _rows(self, split: Split) -> Rows:
        """Yield all rows of a split. Raises DataError if they cannot be read."""

    def _read(self, row: Row, origin: str) -> Parts:
        """Read a row. Raises RowError."""
        return Parts(prompt_of(row, self.config.prompt_column))

    def _problems(self, rows: Iterable[tuple[str, Row | BadRow]], what: str, id_prefix: str = "") -> Loaded:
        """Parse rows. Raises DataError if too many rows of `what` are unusable."""
        problems, bad = parse_rows(rows, self.config, self._read, id_prefix, gather=self.gather)
        self._refuse(what, problems, bad)
        return problems, bad

    def _head(self, split: Split) -> list[tuple[str, Row | BadRow]]:
        """Return the first rows. Raises DataError like `_rows`."""
        if split not in self._heads:
            self._heads[split] = list(islice(self._rows(split), CHECKED_ROWS))
        return self._heads[split]

    def _columns(self, split: Split) -> list[str] | None:
        """Return all columns of the first rows; None if that needs a download. Raises DataError like `_rows`."""
        rows = [row for _, row in self._head(split) if not isinstance(row, BadRow)]
        return list(dict.fromkeys(column for row in rows for column in row))

    def check(self) -> list[str]:
        messages: list[str] = []
        for split in ("train", "heldout"):
            source = self._source(split)
            if source is None:
                continue
            try:
                columns = self._columns(split)
                if columns == []:
                    first = next((row for _, row in self._head(split) if isinstance(row, BadRow)), None)
                    why = f" that can be read; the first: {first.origin}: {first.reason}" if first else ""
                    raise DataError(f"{source} has no rows{why}.")
                lacking = [] if columns is None else missing_columns(self.config, columns, source)
                messages += lacking
                head = [] if lacking or columns is None else self._head(split)
                if head:
                    part = f"the first {len(head)} rows of {source}" if len(head) == CHECKED_ROWS else source
                    self._judged[split] = self._problems(head, part)
            except DataError as error:
                messages.append(str(error))
        if not messages and self._source("train") == self._source("heldout"):
            messages.append(
                f"{self._source('train')} is both training and held-out data: name other held-out data, or none, so "
                "that a share is held out (data.heldout_share)."
            )
        return messages

    def preview(self, split: Split) -> Sequence[Problem]:
        """Return the first problems, or all if `check` has read the whole table. Raises DataError where `load` will."""
        named: set[Split] = {"train"} if self._source("heldout") is None else {"train", "heldout"}
        whole = named == set(self._judged) and all(len(self._head(name)) < CHECKED_ROWS for name in named)
        rows = self._divide(self._judged) if whole and not self.asks_all else self._judged
        return rows.get(split, ([], []))[0]

    def note(self, what: str, origin: str) -> None:
        """Note what is done with a row that is used."""
        count, first = self._noted.get(what, (0, origin))
        self._noted[what] = count + 1, first

    def notes(self) -> list[str]:
        """Return notes on rows that `check` or `load` has read; `load` returns all unusable ones."""
        skipped = [
            f"{len(bad)} of the first {len(self._head(split))} rows of {self._source(split)} are skipped:"
            + first_rows(bad)
            for split, (_, bad) in self._judged.items()
            if bad
        ]
        return skipped + [f"{count} {what} (the first: {first})" for what, (count, first) in self._noted.items()]

    def provides(self) -> frozenset[str]:
        config: RowsConfig = self.config
        try:
            columns = set(self._columns("train") or ())
        except DataError:
            columns = set()  # check() reports why
        provided = columns - config.used_columns() - PROVIDED
        if config.answer_column is not None:
            provided.add("answer")
        if config.reference_columns or config.answer_column is not None:
            provided.add("references")
        return frozenset(provided)

    def load(self, split: Split) -> Loaded:
        if self._loaded is None:
            self._loaded = self._load_both()
        return self._loaded[split]

    def load_set(self) -> Loaded:
        """Return all rows that `path` names."""
        return self._parse("train")

    def _load_both(self) -> dict[Split, Loaded]:
        rows: dict[Split, Loaded] = {"train": self._parse("train")}
        if self._source("heldout") is not None:
            rows["heldout"] = self._parse("heldout", id_prefix="heldout/")
        return self._divide(rows)

    def _divide(self, rows: Mapping[Split, Loaded]) -> dict[Split, Loaded]:
        """Separate training and held-out problems so that they share no question."""
        train, bad = rows["train"]
        if "heldout" not in rows:
            kept, heldout = self._split(train)
            return {"train": (kept, bad), "heldout": (heldout, [])}
        heldout, heldout_bad = rows["heldout"]
        judged = {digest(question_key(problem)): problem.origin for problem in heldout}
        same = [judged.get(digest(question_key(problem))) for problem in train]
        kept = picked(train, [i for i, judge in enumerate(same) if judge is None])
        bad = bad + [
            BadRow(train[i].origin, f"held out: {judge} asks the same question")
            for i, judge in enumerate(same)
            if judge
        ]
        self._refuse(self._source("train"), kept, bad)
        return {"train": (kept, bad), "heldout": (heldout, heldout_bad)}

    def _parse(self, split: Split, id_prefix: str = "") -> Loaded:
        return self._problems(self._rows(split), self._source(split) or "", id_prefix)

    def _refuse(self, what: str | None, problems: Sequence[Problem], bad: list[BadRow]) -> None:
        if bad or not problems:
            rows = sum(problem.rows for problem in problems) + len(bad)
            share, columns = self.config.max_bad_row_share, self.config.named_columns()
            refuse_too_many_bad_rows(bad, rows, share, what or "", columns)

    def _split(self, problems: Sequence[Problem]) -> tuple[Sequence[Problem], Sequence[Problem]]:
        """Split by question: duplicates of a question end up on one side, whatever the order of the file."""
        config: RowsConfig = self.config
        share = DEFAULT_HELDOUT_SHARE if config.heldout_share is None else config.heldout_share
        chosen = held_out(map(question_key, problems), share, config.heldout_seed)
        if chosen is None:
            raise DataError(
                f"{self._source('train')} has only one question, so none can be held out: name held-out data "
                "with data.heldout_path."
            )
        return picked(problems, np.flatnonzero(~chosen)), picked(problems, np.flatnonzero(chosen))


class FileConfig(ColumnsConfig):
    """Files in JSON Lines (`.jsonl`, `.jsonl.gz`), as a JSON list (`.json`), `.csv`, `.tsv` or `.parquet`."""

    path: str | tuple[str, ...]
    """File with the training problems, a pattern (`data/*.jsonl`), or a list of these."""
    heldout_path: str | tuple[str, ...] | None = None
    """The same for the held-out problems; null: a share of `path` (`heldout_share`)."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> FileConfig:
        if self.heldout_path is not None and self.heldout_share is not None:
            raise ValueError("heldout_share has no effect with heldout_path: set one of them")
        return self


class FileSource(TableSource):
    """`data=jsonl data.path=train.jsonl` (or data=csv, data=parquet: the file name decides). GSM8K's own files need no
    other key."""

    Config: ClassVar[type[DataConfig]] = FileConfig

    def _source(self, split: Split) -> str | None:
        names = self.config.path if split == "train" else self.config.heldout_path
        return names if names is None or isinstance(names, str) else ", ".join(names)

    def _rows(self, split: Split) -> Rows:
        key, names = (
            ("data.path", self.config.path) if split == "train" else ("data.heldout_path", self.config.heldout_path)
        )
        for path in local_files(names, key):
            yield from file_rows(path, key, self.config.text_columns())


class DataSetConfig(RowsConfig):
    """A data set of the Hugging Face hub, or a local folder or file."""

    path: str
    """Name on the hub, or a local folder or file."""
    subset: str | None = None
    """Configuration of the data set (`main` for `openai/gsm8k`)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit makes runs repeatable."""
    split: str = "train"
    """Split with the training problems (`datasets` slices such as `train[:1000]` work)."""
    heldout_split: str | None = None
    """Split with the held-out problems."""
    heldout_path: str | None = None
    """Local file with the held-out problems, if they are not a split of `path`."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataSetConfig:
        ways = ("heldout_split", "heldout_path", "heldout_share")
        named = [way for way in ways if getattr(self, way) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other: set one of them")
        if self.revision is not None and Path(self.path).expanduser().exists():
            raise ValueError(f"revision has no effect on local data ({self.path})")
        if is_local(self.path) and (self.split != "train" or self.heldout_split is not None):
            raise ValueError(f"{self.path} is a file and has no splits: leave out split and heldout_split")
        return self


class HfConfig(ColumnsConfig, DataSetConfig):
    """What `datasets` reads."""


class HfSource(TableSource):
    """`data=hf data.path=openai/gsm8k data.subset=main data.heldout_split=test`. Never runs a data set's code."""

    Config: ClassVar[type[DataConfig]] = HfConfig

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._hub_columns: dict[Split, list[str] | None] = {}

    def _where(self, split: Split) -> tuple[str, str, str] | None:
        """Return key, path and split."""
        config: DataSetConfig = self.config
        if split == "train":
            return "data.path", config.path, config.split
        if config.heldout_path is not None:
            return "data.heldout_path", config.heldout_path, "train"
        return None if config.heldout_split is None else ("data.path", config.path, config.heldout_split)

    def _source(self, split: Split) -> str | None:
        where = self._where(split)
        if where is None:
            return None
        _, path, name = where
        return path if is_local(path) else f"{path}[{name}]"

    def _rows(self, split: Split, head: bool = False) -> Rows:
        where = self._where(split)
        assert where is not None
        key, path, name = where
        if is_local(path):
            for file in local_files(path, key):
                yield from file_rows(file, key, self.config.text_columns())
        else:
            yield from data_set_rows(path, key, name, self.config.subset, self.config.revision, head=head)

    def _head(self, split: Split) -> list[tuple[str, Row | BadRow]]:
        if split not in self._heads:
            self._heads[split] = list(islice(self._rows(split, head=True), CHECKED_ROWS))
        return self._heads[split]

    def _columns(self, split: Split) -> list[str] | None:
        where = self._where(split)
        assert where is not None
        key, path, _ = where
        if is_local(path) or Path(path).expanduser().exists():
            return super()._columns(split)
        if split not in self._hub_columns:
            self._hub_columns[split] = hub_columns(path, key, self.config.subset, self.config.revision)
        return self._hub_columns[split]
