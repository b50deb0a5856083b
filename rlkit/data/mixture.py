"""Several sources in one run, drawn by weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, ValidationError, field_validator

from rlkit.data.base import BadRow, DataConfig, DataError, DataSource, Problem, Split
from rlkit.data.rows import digest, question_key
from rlkit.data.stored import stored
from rlkit.environments.base import Environment
from rlkit.experience.names import NotFoundError, find_class, nearest

KINDS = {
    "arithmetic": "rlkit.data.arithmetic.Arithmetic",
    "chat": "rlkit.data.recorded.ChatSource",
    "environment": "rlkit.data.environment.EnvironmentSource",
    "hf": "rlkit.data.files.HfSource",
    "jsonl": "rlkit.data.files.FileSource",
    "pairs": "rlkit.data.recorded.PairsSource",
    "reasoning_gym": "rlkit.data.reasoning_gym.ReasoningGymSource",
    "responses": "rlkit.data.recorded.ResponsesSource",
}
_NAME = re.compile(r"[A-Za-z]\w*")


class MixtureConfig(DataConfig):
    sources: Mapping[str, Mapping[str, Any]] = Field(default={}, validate_default=True)
    """Name -> `kind` (`chat`, `hf`, `jsonl`, `pairs`, `responses`, `arithmetic`, `environment`, `reasoning_gym`, or a
    class's dotted path), `weight` (its share of the prompts, relative to the others'; 1 if not set) and the options of
    that source."""

    @property
    def bad_row_share(self) -> float:
        """Each source must keep to its own share, and all together to the largest."""
        members = [_member(name, fields) for name, fields in self.sources.items()]
        return max(self.max_bad_row_share, *(member.config.max_bad_row_share for member in members))

    @field_validator("sources")
    @classmethod
    def _can_be_read(cls, sources: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        if not sources:
            raise ValueError("names no source; write data.sources.NAME.kind=KIND data.sources.NAME.path=FILE")
        for name, fields in sources.items():
            _member(name, fields)
        return sources


class Member(NamedTuple):
    name: str
    cls: type[DataSource]
    config: DataConfig
    weight: float


def _member(name: str, fields: Mapping[str, Any]) -> Member:
    """Parse one source of a mixture. Raises ValueError."""
    options = dict(fields)
    kind, weight = options.pop("kind", None), options.pop("weight", 1.0)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name}: a name has only letters, digits and _, starting with a letter")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(f"{name}.weight must be a number above 0, not {weight!r}")
    if kind is None:
        raise ValueError(f"{name}.kind is missing; it must be one of {', '.join(KINDS)}, or the dotted path of a class")
    try:
        cls = find_class("data source", KINDS.get(str(kind), kind), DataSource)
    except NotFoundError as error:
        raise ValueError(f"{name}.kind={kind}: {error}; or one of {', '.join(KINDS)}") from error
    if issubclass(cls, Mixture):
        raise ValueError(f"{name}.kind={kind}: a mixture cannot contain another mixture")
    try:
        return Member(name, cls, cls.Config(**options), float(weight))
    except ValidationError as error:
        raise ValueError("; ".join(_wrong(name, one, cls.Config) for one in error.errors())) from error


def _wrong(name: str, error: Any, config: type[DataConfig]) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{name}.{key}: {error['msg']}"
    near = nearest(key, config.model_fields)
    return f"{name}.{key}: no such key" + (f"; did you mean {near}?" if near else "")


class Mixture(DataSource):
    """`data=mixture data.sources.NAME.kind=chat data.sources.NAME.path=FILE ...`."""

    Config: ClassVar[type[DataConfig]] = MixtureConfig

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        members = [_member(name, fields) for name, fields in config.sources.items()]
        self.shares = {member.name: member.weight for member in members}
        self.parts = {member.name: member.cls(member.config, seed) for member in members}

    def take_environment(self, environment: type[Environment], options: Any) -> None:
        for source in self.parts.values():
            source.take_environment(environment, options)

    def weights(self) -> Mapping[str, float]:
        return self.shares

    def provides(self) -> frozenset[str]:
        provided: list[frozenset[str]] = [source.provides() for source in self.parts.values()]
        recorded = [own | {"responses"} if "references" in own else own for own in provided]
        return frozenset.intersection(*recorded)

    def check(self) -> list[str]:
        return [_named(message, name) for name, source in self.parts.items() for message in source.check()]

    def notes(self) -> list[str]:
        return [f"data.sources.{name}: {note}" for name, source in self.parts.items() for note in source.notes()]

    def preview(self, split: Split) -> Sequence[Problem]:
        return [_as_part(p, name) for name, source in self.parts.items() for p in source.preview(split)]

    def load(self, split: Split) -> tuple[Sequence[Problem], list[BadRow]]:
        judged = {}
        if split == "train":
            judged = {digest(question_key(problem)): problem.id for problem in self._problems("heldout", [])}
        bad: list[BadRow] = []

        def problems() -> Iterator[Problem]:
            for problem in self._problems(split, bad):
                other = judged.get(digest(question_key(problem)))
                if other is None:
                    yield problem
                else:
                    bad.append(BadRow(problem.origin, f"held out: {other} asks the same question"))

        return stored(problems()), bad

    def _problems(self, split: Split, bad: list[BadRow]) -> Iterator[Problem]:
        for name, source in self.parts.items():
            try:
                problems, unusable = source.load(split)
            except DataError as error:
                raise DataError(_named(str(error), name)) from error
            bad += unusable
            yield from (_as_part(problem, name) for problem in problems)


def _as_part(problem: Problem, name: str) -> Problem:
    return replace(problem, id=f"{name}/{problem.id}")


def _named(message: str, name: str) -> str:
    return re.sub(r"(?<![\w.])data\.(?=\w)", f"data.sources.{name}.", message)
