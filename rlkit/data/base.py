"""The contract of a data source: plain problems, before any tokenizer."""

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
    """Share of unusable rows that may be skipped (each reported with file and row); above it the run does not start."""

    @property
    def bad_row_share(self) -> float:
        """What all rows that a run reads are held to."""
        return self.max_bad_row_share


@dataclass(frozen=True, slots=True)
class Response:
    """A recorded response to a problem."""

    messages: tuple[Message, ...]
    """What follows the problem's messages: one assistant's, or several turns that end with an assistant's."""
    value: float = 1.0
    """Its label or score; a demonstration and the better one of a pair have 1, the worse one 0."""
    weight: float = 1.0
    """In the loss of fine-tuning."""
    trained: tuple[bool, ...] | None = None
    """Which messages are trained on; None: every assistant's."""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a data source, or rows with responses to one prompt."""

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
        """Its messages; of a task whose environment speaks first, its name in their place."""
        return self.messages or (Message("user", self.id),)

    @property
    def rows(self) -> int:
        """Rows of the data that it came from."""
        return len({response.origin for response in self.responses}) or 1


@dataclass(frozen=True, slots=True)
class BadRow:
    origin: str
    reason: str
    remedy: str = ""
    """What the user can do, if it is not to correct the row."""
    tokens: int = 0
    """Of what is too long."""
    systematic: bool = False
    """A mistake of the whole file: leaving such rows out would change what the others say."""


class DataSource(ABC):
    """Disjoint train and held-out problems. Deterministic: equal config and seed, equal problems."""

    Config: ClassVar[type[DataConfig]] = DataConfig

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.asks_all = False
        """`load_set` alone will be called: nothing is held out."""

    def take_environment(self, environment: type[Environment], options: Any) -> None:  # noqa: B027
        """The run's environment with its options, before anything else is asked: for sources that have its tasks."""

    def check(self) -> list[str]:
        """Cheap checks before a run (files exist, columns exist): messages for the user, empty if all is well."""
        return []

    def preview(self, split: Split) -> Sequence[Problem]:
        """Problems that cost little, for checks before a run: the first ones, or none if only loading tells. Called
        after `check`. Raises DataError where `load` will."""
        return []

    def notes(self) -> list[str]:
        """What happens to rows that were read so far and are used otherwise than they stand, or not at all."""
        return []

    @abstractmethod
    def load(self, split: Split) -> tuple[Sequence[Problem], list[BadRow]]:
        """All problems of a split and the unusable rows. Raises DataError if a split is unusable."""

    def load_set(self) -> tuple[Sequence[Problem], list[BadRow]]:
        """The problems if the source is one of `evaluation.sets`: the held-out ones, or all of a file's."""
        return self.load("heldout")

    def weights(self) -> Mapping[str, float]:
        """Of a mixture: source -> its share of the prompts, relative to the others'. A problem's id begins with
        `source/`."""
        return {}

    def provides(self) -> frozenset[str]:
        """`answer`, `references` and further column names that its problems carry (for reward checks); `responses`,
        `pairs` and `labels` (responses with values that differ)."""
        return frozenset()


class DataError(UserError):
    """Data that cannot be used; the message names the file, the rows and the remedy."""
