"""Rows for training reward models, and their held-out share.

A row is used whole or not at all; unusable rows are named, counted and skipped, up to `data.max_bad_row_share`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from rlkit.data.base import BadRow, DataConfig, DataError
from rlkit.data.cells import Row, RowError
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.data.tables import is_local, local_files, table_rows

DEFAULT_HELDOUT_SHARE = 0.1

Side = Literal["train", "heldout"]
T = TypeVar("T")


class RewardDataConfig(DataConfig):
    """Source of the rows, and the held-out share. A backend nests a subclass as `Data`."""

    path: str
    """File with the rows (`.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.tsv`, `.parquet`), a pattern for such files, or a
    data set that `datasets` loads: a folder, or a name on the Hub."""
    subset: str | None = None
    """Configuration of a data set."""
    split: str = "train"
    """Split of a data set to train on or evaluate."""
    heldout_path: str | None = None
    """File with the held-out rows; null: a share of `path` (`heldout_share`)."""
    heldout_split: str | None = None
    """Split of the data set `path` with the held-out rows."""
    heldout_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the prompts of `path` that is held out, all rows of a prompt together; null means 0.1."""
    heldout_seed: int = Field(default=0, ge=0)
    """Seed that selects the held-out prompts; separate from the run's, so that runs with different seeds are
    comparable."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> RewardDataConfig:
        ways = ("heldout_path", "heldout_split", "heldout_share")
        named = [way for way in ways if getattr(self, way) is not None]
        if len(named) > 1:
            raise ValueError(f"{named[-1]} has no effect with {named[0]}: set one of them")
        return self

    @property
    def has_heldout_rows(self) -> bool:
        """Whether held-out rows are given; otherwise a share of `path` is held out."""
        return self.heldout_path is not None or self.heldout_split is not None

    def problems(self) -> list[str]:
        messages = []
        for key in ("path", "heldout_path"):
            name = getattr(self, key)
            if name is not None and is_local(name):
                try:
                    local_files(name, f"data.{key}")
                except DataError as error:
                    messages.append(str(error))
        if not messages and is_local(self.path):
            for key in ("subset", "split", "heldout_split"):
                value = getattr(self, key)
                if value != type(self).model_fields[key].default:
                    messages.append(f"data.{key}={value}: has no effect with a file")
        return messages


def read(
    config: RewardDataConfig, parse: Callable[[Row, str], Iterable[T]], side: Side = "train"
) -> tuple[list[T], list[BadRow]]:
    """Return what `parse(row, origin)` yields for a side, and the rows for which it raised RowError.

    Raise DataError if the rows cannot be read, or too many are unusable.
    """
    key, name, split = "path", config.path, config.split
    if side == "heldout":
        key, name = "heldout_path", config.heldout_path or config.path
        split = config.heldout_split or split
    rows = list(table_rows(name, f"data.{key}", split, config.subset))
    items: list[T] = []
    bad: list[BadRow] = []
    for origin, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            items += list(parse(row, origin))
        except RowError as error:
            bad.append(BadRow(origin, str(error)))
    refuse_too_many_bad_rows(bad, len(rows), config.max_bad_row_share, f"data.{key}={name}")
    return items, bad


def read_split(
    config: RewardDataConfig,
    load: Callable[[Side], tuple[list[T], list[BadRow]]],
    prompt: Callable[[T], str],
    what: str,
) -> tuple[list[T], list[T], list[BadRow]]:
    """Return training and held-out items and the unusable rows; `load` reads a side, `what` names an item in messages.

    Without held-out rows, a share is held out by a hash of the prompt. Raise DataError if a side is empty.
    """
    train, bad = load("train")
    if config.has_heldout_rows:
        heldout, more = load("heldout")
        bad = bad + more
    else:
        share = config.heldout_share or DEFAULT_HELDOUT_SHARE
        sides: tuple[list[T], list[T]] = ([], [])
        for item in train:
            digest = hashlib.sha256(f"{config.heldout_seed} {prompt(item)}".encode()).digest()
            sides[int.from_bytes(digest[:8]) < share * 2**64].append(item)
        train, heldout = sides
    for name, items in (("training", train), ("held-out", heldout)):
        if not items:
            raise DataError(
                f"data.path={config.path}: no {name} {what} is left; give more rows or another heldout_share"
            )
    return train, heldout, bad


def draw_batches(
    groups: Sequence[Sequence[T]], size: int, seed: int | str, *, across_epochs: bool = True
) -> Iterator[list[T]]:
    """Yield endless batches of `size`; groups are shuffled in each epoch, and the items of a group stay together.

    With `across_epochs`, a batch may span two epochs; otherwise the last batch of an epoch is smaller.
    """
    rng = random.Random(seed)
    queue: list[T] = []
    while True:
        while len(queue) < size and (across_epochs or not queue):
            queue += [item for group in rng.sample(groups, len(groups)) for item in group]
        yield queue[:size]
        queue = queue[size:]
