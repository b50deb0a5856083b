"""Held-out problems: the further sets in `evaluation.sets`, and checks of how answers are sampled and judged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from algorithms.base import Algorithm
from rlkit.config.compose import option_fields
from rlkit.config.messages import (
    ConfigIssue,
    Issues,
    Where,
    all_fields,
    did_you_mean,
    of_the_set,
    of_the_verifier,
    validate,
)
from rlkit.config.overrides import NAME
from rlkit.config.parts import TARGET, HeldoutSet, Part, PartError, import_part
from rlkit.config.schema import EvaluationConfig
from rlkit.data.base import DataConfig, DataSource
from rlkit.data.files import DEFAULT_HELDOUT_SHARE
from rlkit.experience.names import nearest
from rlkit.experience.section import Section

ROWS = ("path", "subset", "split", "revision")
"""Keys that together select the rows. A set with its own path inherits none of them."""


class SetOptions(Section):
    """Keys of a set in addition to those of its source."""

    data: str | None = None
    """An option of `data`; null: the run's source, with its columns."""
    prompts: int | None = Field(default=None, ge=1)
    """Problems per evaluation (all if there are fewer); null: `trainer.evaluation_prompts`."""


class HeldoutSets:
    """Reads sections `evaluation.sets.NAME`: separate data parts, with the columns of `data` unless they name another
    source. `problems` collects the problems of all sections read."""

    def __init__(self, folder: Path, options: Collection[str], data: Mapping[str, Any] | None, where: Where) -> None:
        """`options`: those of `data` in the configuration folder; `data`: the run's section, None if unusable."""
        self.folder, self.options, self.data, self.where = folder, options, data, where
        self.problems: list[ConfigIssue] = []

    def read_all(self, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, HeldoutSet]:
        read = {name: self.read(name, section) for name, section in sets.items()}
        return {name: one for name, one in read.items() if one is not None}

    def read(self, name: str, section: Mapping[str, Any]) -> HeldoutSet | None:
        key = f"evaluation.sets.{name}"
        own = {field: section[field] for field in SetOptions.model_fields if field in section}
        rest = {field: value for field, value in section.items() if field not in own}
        options = self._typed(SetOptions, own, key, {})
        target, fields = self._fields(key, getattr(options, "data", None), rest)
        if target is None:
            return None
        try:
            cls = import_part("data", target)
        except PartError as error:
            self._refuse(f"{key}.{TARGET}", target, str(error))
            return None
        others = f"{key}.data=NAME takes another source: {', '.join(sorted(self.options))}"
        far = [field for field in fields if nearest(field, cls.Config.model_fields) is None]
        unknown = {f"{key}.{field}": f"{cls.__name__} does not have it; {others}" for field in far}
        config = self._typed(cls.Config, fields, key, unknown)
        return None if options is None or config is None else HeldoutSet(cls, config, options.prompts)

    def _fields(self, key: str, option: str | None, own: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the class of a set's source (None if unknown) and its fields."""
        if not NAME.fullmatch(key.rpartition(".")[2]):
            self._refuse(key, {}, "is used in metric names: only letters, digits and _, starting with a letter")
            return None, {}
        if option is not None and option not in self.options:
            self._refuse(f"{key}.data", option, f"no such option; {did_you_mean(option, self.options)}")
            return None, {}
        if not own:
            self._refuse(key, {}, f"has no source of problems; write {key}.path=FILE")
            return None, {}
        if option is not None:
            fields = option_fields(self.folder, "data", option) | own
        elif TARGET in own or self.data is None:
            fields = own  # unusable data has nothing to inherit; it is reported itself
        else:
            rows = ROWS if "path" in own else ()
            inherited = {k: v for k, v in self.data.items() if not k.startswith("heldout_") and k not in rows}
            fields = inherited | own
        target = fields.pop(TARGET, None)
        return target, fields

    def _typed(self, model: type, fields: Mapping[str, Any], key: str, notes: Mapping[str, str]) -> Any:
        known = [full for full, _ in all_fields(model, f"{key}.")]
        typed, problems = validate(model, fields, f"{key}.", known, self.where, notes)
        self.problems += [of_the_set(problem, key) for problem in problems]
        return typed

    def _refuse(self, key: str, value: Any, message: str) -> None:
        self.problems.append(ConfigIssue(self.where(key, value), message))


def with_whole_sets(evaluation: EvaluationConfig, sets: Mapping[str, HeldoutSet]) -> EvaluationConfig:
    """Return the section with every value of its sets filled in."""
    return evaluation.model_copy(update={"sets": {name: one.section() for name, one in sets.items()}})


def held_out_from(config: DataConfig) -> str:
    """Describe how a source separates its held-out problems from its training problems, with the key that sets it."""
    if hasattr(config, "heldout_problems"):
        return "drawn (data.heldout_problems)"
    for key, what in (("heldout_path", "those in"), ("heldout_split", "the split")):
        if (value := getattr(config, key, None)) is not None:
            names = ", ".join(value) if isinstance(value, tuple) else value
            return f"{what} {names} (data.{key})"
    if "heldout_share" in type(config).model_fields:
        share = getattr(config, "heldout_share", None) or DEFAULT_HELDOUT_SHARE
        return f"{share:.3g} of the questions in {getattr(config, 'path', 'the data')} (data.heldout_share)"
    return "chosen by the data source"


def evaluation_is_of_one_kind(evaluation: EvaluationConfig) -> Issues:
    if evaluation.greedy and evaluation.samples > 1:
        yield ConfigIssue(
            "evaluation.samples",
            f"{evaluation.samples} greedy responses (evaluation.greedy=true) to a prompt are all the same; leave one "
            "of these options out",
        )
    if evaluation.greedy and evaluation.temperature is not None:
        yield ConfigIssue("evaluation.temperature", "has no effect with evaluation.greedy=true; leave one of them out")


def verifier_judges_held_out_answers(verifier: Part, data: DataSource, evaluation: EvaluationConfig) -> Issues:
    """A verifier must not learn, and judges the responses using what the data provide."""
    traits = verifier.cls.traits(verifier.config)
    if traits.update_when != "none" or traits.follows_policy:
        yield ConfigIssue(
            "verifier", f"{verifier.cls.__name__} learns during the run; a verifier must not change its judgements"
        )
    if traits.samples > evaluation.samples:
        yield ConfigIssue(
            "verifier",
            f"{verifier.cls.__name__} compares {traits.samples} responses to a prompt; a held-out prompt has "
            f"{evaluation.samples} (evaluation.samples)",
        )
    # A run without gold answers is not evaluated; it warns of that once the rows are read.
    needed = [*(["references"] if traits.references else []), *traits.columns]
    yield from _lacking("verifier", verifier, needed, data)


def verifier_is_usable(verifier: Part) -> Issues:
    for message in verifier.cls.check(verifier.config):
        yield of_the_verifier(ConfigIssue("verifier", message))


def verifier_can_compare_training_answers(verifier: Part, evaluation: EvaluationConfig, algorithm: Algorithm) -> Issues:
    needed, responses = verifier.cls.traits(verifier.config).samples, algorithm.config.samples_per_prompt
    if evaluation.training_answers and responses < needed <= evaluation.samples:
        yield ConfigIssue(
            "evaluation.training_answers",
            f"{verifier.cls.__name__} compares {needed} responses to a prompt, but training samples {responses} "
            "(algorithm.samples_per_prompt); set this to false",
        )


def held_out_sets_are_usable(sets: Mapping[str, DataSource | None], verifier: Part) -> Issues:
    traits = verifier.cls.traits(verifier.config)
    needed = ["answer"] * traits.answer + ["references"] * traits.references + list(traits.columns)
    for name, source in sets.items():
        key = f"evaluation.sets.{name}"
        if source is not None:
            messages = [of_the_set(ConfigIssue(key, message), key) for message in source.check()]
            yield from messages or _lacking(key, verifier, needed, source)


def _lacking(where: str, verifier: Part, needed: Sequence[str], data: DataSource) -> Issues:
    provided = data.provides()
    lacking = [name for name in needed if name not in provided]
    if lacking:
        yield ConfigIssue(
            where,
            f"{verifier.cls.__name__} needs {', '.join(lacking)} with every prompt, but {type(data).__name__} provides "
            f"{', '.join(sorted(provided)) or 'nothing besides prompts'}; choose other data or another verifier",
        )


HELDOUT = (
    evaluation_is_of_one_kind,
    verifier_judges_held_out_answers,
    verifier_is_usable,
    verifier_can_compare_training_answers,
    held_out_sets_are_usable,
)
