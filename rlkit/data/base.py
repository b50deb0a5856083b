"""The contract of a data source: plain problems, before any tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlkit.experience import Message, UserError
from rlkit.experience.section import Section

Split = Literal["train", "heldout"]


class DataConfig(Section):
    """Fields of every data source. A source nests its own subclass as `Config`."""

    max_bad_row_share: float = Field(default=0.01, ge=0, le=1)
    """Share of unusable rows that may be skipped (each reported with file and row); above it the run does not start."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a data source."""

    id: str
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    """For error messages: `file.jsonl:12`."""


@dataclass(frozen=True, slots=True)
class BadRow:
    origin: str
    reason: str
    remedy: str = ""
    """What the user can do, if it is not to correct the row."""


class DataSource(ABC):
    """Disjoint train and held-out problems. Deterministic: equal config and seed, equal problems."""

    Config: ClassVar[type[DataConfig]] = DataConfig

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed

    def check(self) -> list[str]:
        """Cheap checks before a run (files exist, columns exist): messages for the user, empty if all is well."""
        return []

    def preview(self, split: Split) -> list[Problem]:
        """Problems that cost little, for checks before a run: the first ones, or none if only loading tells. Called
        after `check` has found nothing."""
        return []

    @abstractmethod
    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        """All problems of a split and the unusable rows. Raises DataError if a split is unusable."""

    def provides(self) -> frozenset[str]:
        """`answer`, `references` and further column names that its problems carry (for reward checks)."""
        return frozenset()


class DataError(UserError):
    """Data that cannot be used; the message names the file, the rows and the remedy."""
