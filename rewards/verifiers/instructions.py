"""`reward=instructions`: checks constraints by program, with IFEval's names, arguments and columns.

Implemented from the paper (arXiv 2311.07911), with regular expressions instead of NLTK.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from rewards.base import RewardTraits
from rewards.verifiers.json_schema import read_json
from rewards.verifiers.pool import CannotJudgeError, TextRule, TextRuleConfig, column_value
from rlkit.experience import Prompt, Score
from rlkit.experience.section import Section

_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_HIGHLIGHT = re.compile(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*")
_TITLE = re.compile(r"<<([^<>\n]+)>>")
_FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def number_of_placeholders(text: str, *, num_placeholders: float) -> bool:
    """At least this many placeholders in square brackets."""
    return len(_PLACEHOLDER.findall(text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript that starts with `P.S.` or `P.P.S` and contains words."""
    marker = postscript_marker.strip()
    letters = re.sub(r"[.\s]", "", marker).upper()
    if letters in ("PS", "PPS"):
        pattern = r"\.?\s?".join(letters) + r"\.?"
    else:
        pattern = re.escape(marker)
    return re.search(rf"(?<!\w){pattern}[\s:,-]*\w", text, re.IGNORECASE) is not None


def number_of_bullets(text: str, *, num_bullets: float) -> bool:
    """Exactly this many lines that start with `*` or `-`."""
    bullets = [line for line in text.splitlines() if re.match(r"\s*(?:\*(?!\*)|-(?!-))\s*\S", line)]
    return len(bullets) == num_bullets


def constrained_response(text: str) -> bool:
    """One of IFEval's three fixed answers."""
    return any(answer in text for answer in _FIXED_ANSWERS)


def number_of_highlights(text: str, *, num_highlights: float) -> bool:
    """At least this many parts in `*...*` or `**...**`."""
    return sum(bool(part.strip("* ")) for part in _HIGHLIGHT.findall(text)) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: float) -> bool:
    """At least this many headings of a word and a number (`Section 1`); the spelling is IFEval's."""
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """The whole response is JSON, possibly in one fenced block."""
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and len(body) >= 6:
        body = re.sub(r"^```(?:json)?", "", body, count=1, flags=re.IGNORECASE).removesuffix("```")
    return "```" not in body and read_json(body) is not None


def title(text: str) -> bool:
    """A title in double angle brackets."""
    return any(inside.strip() for inside in _TITLE.findall(text))


def two_responses(text: str) -> bool:
    """Two different answers, separated by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """The text ends with the phrase; quotation marks around it are ignored."""
    return text.strip().strip('"').rstrip().lower().endswith(end_phrase.strip().strip('"').lower())


def quotation(text: str) -> bool:
    body = text.strip()
    return len(body) > 2 and body.startswith('"') and body.endswith('"')


CHARACTERS_FOR_LANGUAGE = 4000
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+(?:['’\-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|\n\s*\n")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|approx|No|Inc|Ltd|Co)|\b[A-Z])\.$")


def compare(count: int, relation: str, target: int | float) -> bool:
    if relation == "at least":
        return count >= target
    if relation == "less than":
        return count < target
    raise ValueError(f"the relation {relation!r} is neither 'at least' nor 'less than'")


def keywords_exist(text: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, in upper or lower case."""
    return all(keyword.casefold() in text.casefold() for keyword in keywords)


def keyword_frequency(text: str, *, keyword: str, frequency: float, relation: str) -> bool:
    return compare(text.casefold().count(keyword.strip().casefold()), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a whole word, in upper or lower case."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: float, let_relation: str) -> bool:
    """How often a letter or sign occurs, in upper or lower case."""
    if len(letter) != 1:
        raise ValueError(f"letter must be one character, not {letter!r}")
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, *, language: str) -> bool:
    """The language, given by its ISO 639-1 code."""
    return bool(text.strip()) and language_of(text) == language.split("-")[0].lower()


def number_of_sentences(text: str, *, num_sentences: float, relation: str) -> bool:
    return compare(count_sentences(text), relation, num_sentences)


def number_of_words(text: str, *, num_words: float, relation: str) -> bool:
    """Words are runs of letters, digits and `_`."""
    return compare(len(_WORD.findall(text)), relation, num_words)


def number_of_paragraphs(text: str, *, num_paragraphs: float) -> bool:
    """Exactly this many paragraphs, separated by `***`, with no empty one in the middle."""
    parts = [part.strip() for part in re.split(r"\*\*\*", text)]
    inner = parts[1:-1]
    return all(inner) and sum(bool(part) for part in parts) == num_paragraphs


def nth_paragraph_first_word(text: str, *, num_paragraphs: float, nth_paragraph: float, first_word: str) -> bool:
    """Exactly this many paragraphs, separated by empty lines; the n-th (from 1) starts with this word."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    number = int(nth_paragraph)
    if len(paragraphs) != num_paragraphs or not 1 <= number <= len(paragraphs):
        return False
    word = paragraphs[number - 1].split()[0].lstrip("\"'“‘*_(").lower()
    first = first_word.strip().lower()
    return re.fullmatch(rf"{re.escape(first)}(?:\W.*)?", word, re.DOTALL) is not None


def capital_word_frequency(text: str, *, capital_frequency: float, capital_relation: str) -> bool:
    return compare(sum(word.isupper() for word in _TOKEN.findall(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and language_of(text) == "en"


def english_lowercase(text: str) -> bool:
    return text.islower() and language_of(text) == "en"


def no_comma(text: str) -> bool:
    return "," not in text


def count_sentences(text: str) -> int:
    """Count sentences, ended by . ! ? or their full-width forms, or an empty line, but not by `Dr.` or initials."""
    count = start = 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.end()].strip()
        if end[0] == "." and _ABBREVIATION.search(sentence[-12:]) and text[end.end() :].strip():
            continue
        count += bool(_WORD.search(sentence))
        start = end.end()
    return count + bool(_WORD.search(text[start:]))


def language_of(text: str) -> str:
    """Return the ISO 639-1 code; the text is lower-cased, because the model was mostly trained on lower case."""
    import py3langid

    label: str = py3langid.classify(text[:CHARACTERS_FOR_LANGUAGE].lower())[0]
    return label


CONSTRAINTS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": keywords_exist,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_of_sentences,
    "length_constraints:number_words": number_of_words,
    "length_constraints:number_paragraphs": number_of_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_of_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_of_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_of_highlights,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}


class Instruction(Section):
    id: str
    """As in IFEval's instruction_id_list."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """As in IFEval's kwargs."""


@dataclass(frozen=True, slots=True)
class Constraint:
    name: str
    arguments: Mapping[str, Any]

    def followed(self, text: str) -> bool:
        return bool(text.strip()) and CONSTRAINTS[self.name](text, **self.arguments)


class Instructions(TextRule):
    """How well a response keeps to constraints such as `at least 300 words` or `no comma`."""

    class Config(TextRuleConfig):
        id_column: str = "instruction_id_list"
        """Column with the list of a prompt's constraints."""
        kwargs_column: str = "kwargs"
        """Column with the list of their arguments, one object each (nulls are ignored)."""
        always: tuple[Instruction, ...] = ()
        """Constraints on every response, in addition to those in the columns, which may then be missing."""
        grade: Literal["all", "share"] = "all"
        """all: 1 if every constraint is followed, else 0; share: the share of constraints followed."""
        loose: bool = False
        """Also try the text without its first line, its last line, both, and without asterisks (IFEval's loose
        accuracy)."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        columns = () if config.always else (config.id_column, config.kwargs_column)
        return RewardTraits(columns=columns, uses_gpu=False)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        messages = super().check(config)
        for index, instruction in enumerate(config.always):
            try:
                _constraint(instruction.id, instruction.kwargs)
            except CannotJudgeError as error:
                messages.append(f"reward.always[{index}]: {str(error).partition(': ')[2]}")
        return messages

    def task(self, prompt: Prompt) -> tuple[Constraint, ...]:
        config = self.config
        constraints = [_constraint(instruction.id, instruction.kwargs) for instruction in config.always]
        if not config.always or config.id_column in prompt.columns:
            names, arguments = (column_value(prompt, column) for column in (config.id_column, config.kwargs_column))
            if not _is_list(names) or not _is_list(arguments) or len(names) != len(arguments):
                both = f"{config.id_column!r} and {config.kwargs_column!r}"
                raise CannotJudgeError(f"bad_column: columns {both} do not hold two lists of equal length")
            constraints += [_constraint(name, kwargs) for name, kwargs in zip(names, arguments, strict=True)]
        if not constraints:
            raise CannotJudgeError("no_instructions: the prompt has no constraints to check")
        return tuple(constraints)

    @staticmethod
    def judge(config: Any, task: tuple[Constraint, ...], text: str, /) -> Score:
        texts = loose_texts(text) if config.loose else (text,)
        verdicts = [any(constraint.followed(version) for version in texts) for constraint in task]
        components = {"all": float(all(verdicts)), "share": sum(verdicts) / len(verdicts)}
        trace = ", ".join(
            f"{'+' if verdict else '-'}{constraint.name}" for verdict, constraint in zip(verdicts, task, strict=True)
        )
        return Score(components[config.grade], components=components, trace=trace)


def loose_texts(text: str) -> tuple[str, ...]:
    lines = text.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    versions = ["\n".join(part).strip() for part in cut]
    versions[0] = text
    return tuple(dict.fromkeys([*versions, *(version.replace("*", "") for version in versions)]))


def _constraint(name: Any, kwargs: Any) -> Constraint:
    check = CONSTRAINTS.get(name) if isinstance(name, str) else None
    if check is None:
        near = difflib.get_close_matches(str(name), CONSTRAINTS, n=1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONSTRAINTS)}"
        raise CannotJudgeError(f"bad_instruction: there is no constraint {name!r:.80}; {known}")
    if not isinstance(kwargs, Mapping):
        raise CannotJudgeError(f"bad_instruction: the arguments of {name} are not an object")
    arguments = {key: value for key, value in kwargs.items() if value is not None}
    parameters = {
        key: parameter.annotation
        for key, parameter in inspect.signature(check).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if set(arguments) != set(parameters):
        has = ", ".join(arguments) or "nothing"
        raise CannotJudgeError(
            f"bad_instruction: {name} needs {', '.join(parameters) or 'no arguments'} and is given {has}"
        )
    for key, value in arguments.items():
        if not _TYPES[parameters[key]](value):
            raise CannotJudgeError(f"bad_instruction: {key} of {name} must be {parameters[key]}, not {value!r:.80}")
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
