"""The contract of a data source: plain problems, before any tokenisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlkit.environments.base import Environment
from rlkit.experience import Message, PreferencePair, UserError
from rlkit.experience.section import Section

Split = Literal["train", "heldout"]


class DataConfig(Section):
    """Fields of every data source. A source nests its own subclass as `Config`."""

    max_bad_row_share: float = Field(default=0.01, ge=0, le=1)
    """Share of unusable rows that may be skipped (each reported with file and row). Above it, a run does not start."""

    @property
    def bad_row_share(self) -> float:
        """Largest share of bad rows among all rows that a run reads."""
        return self.max_bad_row_share


@dataclass(frozen=True, slots=True)
class Response:
    """A recorded response to a problem."""

    messages: tuple[Message, ...]
    """The messages after the problem's: one of the assistant's, or several turns that end with one."""
    value: float = 1.0
    """Its label or score. A demonstration and the better response of a pair have 1, the worse one 0."""
    weight: float = 1.0
    """Its weight in the fine-tuning loss."""
    trained: tuple[bool, ...] | None = None
    """Which messages are trained on; None: all of the assistant's."""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a data source, or several rows with responses to one prompt."""

    id: str
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    """For error messages: `file.jsonl:12`."""
    responses: tuple[Response, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()
    """Preferences between `responses`, by their index."""

    @property
    def question(self) -> tuple[Message, ...]:
        """The problem's messages or, for a task whose environment speaks first, its id in their place."""
        return self.messages or (Message("user", self.id),)

    @property
    def rows(self) -> int:
        """Number of data rows that it came from."""
        return len({response.origin for response in self.responses}) or 1


@dataclass(frozen=True, slots=True)
class BadRow:
    origin: str
    reason: str
    remedy: str = ""
    """What the user can do other than correct the row."""
    tokens: int = 0
    """Number of tokens, if the row is too long."""
    systematic: bool = False
    """Whether the whole file is at fault, so that skipping such rows would change what the others mean."""


class DataSource(ABC):
    """Disjoint training and held-out problems. Deterministic: same config and seed, same problems."""

    Config: ClassVar[type[DataConfig]] = DataConfig

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.asks_all = False
        """Whether only `load_set` will be called, so that nothing is held out."""

    def take_environment(self, environment: type[Environment], options: Any) -> None:  # noqa: B027
        """Take the run's environment with its options, before any other call; for sources that use its tasks."""

    def check(self) -> list[str]:
        """Run cheap checks before a run (files exist, columns exist); return messages for the user, if any."""
        return []

    def preview(self, split: Split) -> Sequence[Problem]:
        """Return problems that are cheap to get, for checks before a run: the first ones, or none if that requires
        loading. Called after `check`. Raises DataError where `load` will."""
        return []

    def notes(self) -> list[str]:
        """Return notes on rows read so far that are skipped or not used as they are."""
        return []

    @abstractmethod
    def load(self, split: Split) -> tuple[Sequence[Problem], list[BadRow]]:
        """Return all problems of a split and the unusable rows. Raises DataError if a split is unusable."""

    def load_set(self) -> tuple[Sequence[Problem], list[BadRow]]:
        """Return the problems of a source in `evaluation.sets`: the held-out ones, or all in a file."""
        return self.load("heldout")

    def weights(self) -> Mapping[str, float]:
        """Return source -> its share of the prompts, relative to the others', if the source is a mixture. There a
        problem's id begins with `source/`."""
        return {}

    def provides(self) -> frozenset[str]:
        """Return what its problems have, for checks of rewards: `answer`, `references`, further column names,
        `responses`, `pairs` and `labels` (responses with differing values)."""
        return frozenset()


class DataError(UserError):
    """Data that cannot be used; the message names the file, the rows and the remedy."""
