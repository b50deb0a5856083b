"""`reward=instructions`: constraints that a program can check, from the data columns that IFEval has."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rewards.base import RewardNeeds
from rewards.rule import constraints, constraints_layout
from rewards.rule.text_rule import CannotJudgeError, TextRule, TextRuleConfig, column_value
from rlkit.experience import Prompt, Score

CONSTRAINTS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": constraints.keywords_exist,
    "keywords:frequency": constraints.keyword_frequency,
    "keywords:forbidden_words": constraints.forbidden_words,
    "keywords:letter_frequency": constraints.letter_frequency,
    "language:response_language": constraints.response_language,
    "length_constraints:number_sentences": constraints.number_of_sentences,
    "length_constraints:number_words": constraints.number_of_words,
    "length_constraints:number_paragraphs": constraints.number_of_paragraphs,
    "length_constraints:nth_paragraph_first_word": constraints.nth_paragraph_first_word,
    "detectable_content:number_placeholders": constraints_layout.number_of_placeholders,
    "detectable_content:postscript": constraints_layout.postscript,
    "detectable_format:number_bullet_lists": constraints_layout.number_of_bullets,
    "detectable_format:constrained_response": constraints_layout.constrained_response,
    "detectable_format:number_highlighted_sections": constraints_layout.number_of_highlights,
    "detectable_format:multiple_sections": constraints_layout.multiple_sections,
    "detectable_format:json_format": constraints_layout.json_format,
    "detectable_format:title": constraints_layout.title,
    "combination:two_responses": constraints_layout.two_responses,
    "combination:repeat_prompt": constraints_layout.repeat_prompt,
    "startend:end_checker": constraints_layout.end_checker,
    "startend:quotation": constraints_layout.quotation,
    "change_case:capital_word_frequency": constraints.capital_word_frequency,
    "change_case:english_capital": constraints.english_capital,
    "change_case:english_lowercase": constraints.english_lowercase,
    "punctuation:no_comma": constraints.no_comma,
}


class Instruction(BaseModel):
    """One constraint."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    id: str
    """Its name, as in IFEval's instruction_id_list."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its arguments, as in IFEval's kwargs."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint whose arguments fit."""

    name: str
    arguments: Mapping[str, Any]

    def followed(self, text: str) -> bool:
        """Whether a text keeps to it."""
        return bool(text.strip()) and CONSTRAINTS[self.name](text, **self.arguments)


class Instructions(TextRule):
    """How well a response keeps to constraints such as `at least 300 words` or `no comma`."""

    class Config(TextRuleConfig):
        """Options of the instruction reward."""

        id_column: str = "instruction_id_list"
        """Column with the names of a prompt's constraints, a list."""
        kwargs_column: str = "kwargs"
        """Column with their arguments, a list as long of objects (nulls in them are left out)."""
        always: tuple[Instruction, ...] = ()
        """Constraints on every response. If set, the columns may be missing; what they hold is checked besides."""
        grade: Literal["all", "share"] = "all"
        """all: 1 if every constraint is followed, else 0; share: the share of them that is."""
        loose: bool = False
        """Also try the text without its first line, its last line, both, and without asterisks, as IFEval's loose
        accuracy does."""

    @classmethod
    def needs(cls, config: Any) -> RewardNeeds:
        """The two columns, unless every response has the same constraints."""
        return RewardNeeds(columns=() if config.always else (config.id_column, config.kwargs_column))

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """The constraints on every response exist and have the arguments they need."""
        messages = super().check(config)
        for index, instruction in enumerate(config.always):
            try:
                _constraint(instruction.id, instruction.kwargs)
            except CannotJudgeError as error:
                messages.append(f"reward.always[{index}]: {str(error).partition(': ')[2]}")
        return messages

    def task(self, prompt: Prompt) -> tuple[Constraint, ...]:
        """The prompt's constraints."""
        config = self.config
        found = [_constraint(instruction.id, instruction.kwargs) for instruction in config.always]
        if not config.always or config.id_column in prompt.columns:
            names, arguments = (column_value(prompt, column) for column in (config.id_column, config.kwargs_column))
            if not _is_list(names) or not _is_list(arguments) or len(names) != len(arguments):
                both = f"{config.id_column!r} and {config.kwargs_column!r}"
                raise CannotJudgeError(f"bad_column: columns {both} hold no two lists of one length")
            found += [_constraint(name, given) for name, given in zip(names, arguments, strict=True)]
        if not found:
            raise CannotJudgeError("no_instructions: the prompt has no constraint to check")
        return tuple(found)

    @staticmethod
    def judge(config: Any, task: tuple[Constraint, ...], text: str, /) -> Score:
        """Components: `all` (0 or 1) and `share` of the constraints that are followed."""
        texts = loose_texts(text) if config.loose else (text,)
        verdicts = [any(constraint.followed(each) for each in texts) for constraint in task]
        components = {"all": float(all(verdicts)), "share": sum(verdicts) / len(verdicts)}
        trace = ", ".join(
            f"{'+' if verdict else '-'}{constraint.name}" for verdict, constraint in zip(verdicts, task, strict=True)
        )
        return Score(components[config.grade], components=components, trace=trace)


def loose_texts(text: str) -> tuple[str, ...]:
    """The eight versions of a text that IFEval's loose accuracy accepts."""
    lines = text.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    versions = ["\n".join(part).strip() for part in cut]
    versions[0] = text
    return tuple(dict.fromkeys([*versions, *(version.replace("*", "") for version in versions)]))


def _constraint(name: Any, given: Any) -> Constraint:
    """A constraint that can be checked. Raises CannotJudgeError with what is wrong."""
    check = CONSTRAINTS.get(name) if isinstance(name, str) else None
    if check is None:
        near = difflib.get_close_matches(str(name), CONSTRAINTS, n=1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONSTRAINTS)}"
        raise CannotJudgeError(f"bad_instruction: there is no constraint {name!r:.80}; {known}")
    if not isinstance(given, Mapping):
        raise CannotJudgeError(f"bad_instruction: the arguments of {name} are no object")
    arguments = {key: value for key, value in given.items() if value is not None}
    wanted = {
        key: parameter.annotation
        for key, parameter in inspect.signature(check).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if set(arguments) != set(wanted):
        has = ", ".join(arguments) or "nothing"
        raise CannotJudgeError(
            f"bad_instruction: {name} needs {', '.join(wanted) or 'no arguments'} and is given {has}"
        )
    for key, value in arguments.items():
        if not _TYPES[wanted[key]](value):
            raise CannotJudgeError(f"bad_instruction: {key} of {name} must be {wanted[key]}, not {value!r:.80}")
        if key.endswith("relation") and value not in ("at least", "less than"):
            raise CannotJudgeError(
                f"bad_instruction: {key} of {name} must be 'at least' or 'less than', not {value!r:.80}"
            )
    return Constraint(name, arguments)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPES: Mapping[Any, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str) and value.strip() != "",
    "float": _is_number,
    "list[str]": lambda value: _is_list(value) and bool(value) and all(isinstance(word, str) for word in value),
}
