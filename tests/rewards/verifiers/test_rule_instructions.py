"""IFEval-style constraints: a followed and a broken response for each, strict and loose, and bad data."""

from __future__ import annotations

from typing import Any

import pytest

from rewards.base import RewardContext
from rewards.verifiers.instructions import CONSTRAINTS, Instructions, count_sentences, loose_texts
from rewards.verifiers.pool import CannotJudgeError
from rlkit.experience import Message, Prompt, Score

LEAST, LESS = "at least", "less than"
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Rain", "sun"]}, ["Sun and rain."], ["Only rain.", "none"]),
    (
        "keywords:frequency",
        {"keyword": "rain", "frequency": 2, "relation": LEAST},
        ["Rain, rain!", "rain rain rain"],
        ["rain"],
    ),
    ("keywords:frequency", {"keyword": "rain", "frequency": 2.0, "relation": LESS}, ["rain", "sun"], ["rain rain"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rain", "c++"]}, ["A train in C."], ["Rain!", "I like C++."]),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": LEAST}, ["Eee"], ["ee"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": LESS}, ["no"], ["no!"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist ein kurzer Text über Hunde und Katzen im Garten."],
        ["This is a short text about dogs and cats in the garden."],
    ),
    (
        "language:response_language",
        {"language": "fr"},
        ["Ceci est un texte court qui parle des chiens et des chats."],
        ["Esto es un texto corto sobre los perros y los gatos."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LEAST}, ["One. Two."], ["One."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, ["Dr. Who came."], ["One. Two."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LEAST}, ["one two three"], ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one, two."], ["a b c"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb"],
        ["a", "a***b***c"],
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n\nb***c"], ["a\n***\n***\nb"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["First a.\n\nThen b.", 'First.\n\n"Then, b"'],
        ["First.\n\nThenceforth", "Then a.\n\nb", "a\n\nThen b\n\nc"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name], [date]"], ["[name]", "[[]]"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["x\nP.S. y", "x\nps: y"],
        ["x", "x P.S.", "tops y"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S y", "x P.P.S. y"], ["x\nP.S. y"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  * b"], ["* a", "* a\n**b**"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes."], ["Yes.", "My answer is perhaps."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b c**"], ["*a*", "** ** *a*"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "Section a Section b"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```', "[1]"], ["a: 1", 'Here: {"a": 1}']),
    ("detectable_format:title", {}, ["<<My day>>\nIt rained."], ["My day", "<< >>", "<My day>"]),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo"],
        ["one", "one******one", "a******b******c", "a************b"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Who am I?"}, ["Who am I? You are you."], ["You. Who am I?"]),
    (
        "startend:end_checker",
        {"end_phrase": "Is that all?"},
        ["x. Is that all?", '"x is that all?"'],
        ["Is that all? No."],
    ),
    ("startend:quotation", {}, ['"All of it."'], ['"All" of it', "All", '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": LEAST},
        ["NASA and the WELL-KNOWN ESA"],
        ["NASA and Esa"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS A LOUD TEXT ABOUT DOGS AND CATS."],
        ["This is not.", "DAS IST EIN KURZER TEXT ÜBER HUNDE UND KATZEN."],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is a quiet text about dogs and cats."],
        ["This is a text about dogs."],
    ),
    ("punctuation:no_comma", {}, ["No such sign."], ["Well, no."]),
]


def prompt(names: Any = None, kwargs: Any = None) -> Prompt:
    columns = {"instruction_id_list": names, "kwargs": kwargs} if names is not None else {}
    return Prompt("p", (Message("user", "?"),), (1,), columns=columns)


def judge(text: str, names: Any = None, kwargs: Any = None, **options: Any) -> Score:
    config = Instructions.Config(**options)
    return Instructions.judge(config, Instructions(config, RewardContext()).task(prompt(names, kwargs)), text)


@pytest.mark.parametrize(("name", "kwargs", "followed", "broken"), CASES)
def test_each_constraint(name: str, kwargs: dict[str, Any], followed: list[str], broken: list[str]) -> None:
    assert [text for text in followed if judge(text, [name], [kwargs]).value != 1.0] == []
    assert [text for text in broken if judge(text, [name], [kwargs]).value != 0.0] == []
    assert judge("  ", [name], [kwargs]).value == 0.0, "an empty response follows nothing"


def test_every_constraint_of_ifeval_is_there_and_tested() -> None:
    assert len(CONSTRAINTS) == 25
    assert {name for name, *_ in CASES} == set(CONSTRAINTS)


def test_several_constraints() -> None:
    names = ["punctuation:no_comma", "length_constraints:number_words", "detectable_format:title"]
    nulls = {"keywords": None, "num_bullets": None}  # what a table with one type per column makes of absent keys
    kwargs = [nulls, {"num_words": 2.0, "relation": "at least", **nulls}, nulls]
    one_broken = judge("no comma here", names, kwargs)
    assert one_broken.value == 0.0
    assert one_broken.components == pytest.approx({"all": 0.0, "share": 2 / 3})
    assert one_broken.trace == "+punctuation:no_comma, +length_constraints:number_words, -detectable_format:title"
    assert judge("no comma here", names, kwargs, grade="share").value == pytest.approx(2 / 3)
    assert judge("<<no comma>>", names, kwargs).value == 1.0
    assert judge("<<no comma>>", '["punctuation:no_comma"]', "[{}]").value == 1.0


def test_loose_forgives_a_first_and_a_last_line_and_asterisks() -> None:
    names, kwargs = ["startend:end_checker"], [{"end_phrase": "the end"}]
    text = "Sure, here it is:\nIt was **the end**\nI hope this helps."
    assert judge(text, names, kwargs).value == 0.0
    assert judge(text, names, kwargs, loose=True).value == 1.0
    assert len(loose_texts(text)) == 8
    assert loose_texts("a") == ("a", "")
    assert judge("a", ["punctuation:no_comma"], [{}], loose=True).value == 1.0


def test_constraints_on_every_response() -> None:
    always = [{"id": "punctuation:no_comma"}, {"id": "keywords:existence", "kwargs": {"keywords": ["rain"]}}]
    assert judge("rain", always=always).value == 1.0
    assert judge("rain, rain", always=always).value == 0.0
    assert judge("rain", ["detectable_format:title"], [{}], always=always).value == 0.0
    config = Instructions.Config(always=always)
    assert Instructions.traits(config).columns == ()
    assert Instructions.traits(Instructions.Config()).columns == ("instruction_id_list", "kwargs")
    assert Instructions.check(config) == []
    (message,) = Instructions.check(Instructions.Config(always=[{"id": "keywords:existence"}]))
    assert message == "reward.always[0]: keywords:existence needs keywords and is given nothing"


@pytest.mark.parametrize(
    ("names", "kwargs", "reason"),
    [
        (None, None, "no_column"),
        ("", "", "bad_column"),
        ([], [], "no_instructions"),
        (["punctuation:no_comma"], [], "bad_column"),
        (["punctuation:no_commas"], [{}], "bad_instruction: there is no constraint 'punctuation:no_commas'"),
        (["punctuation:no_comma"], ["x"], "bad_instruction"),
        (["keywords:existence"], [{"keyword": "x"}], "bad_instruction: keywords:existence needs keywords"),
        (["keywords:existence"], [{"keywords": "rain"}], "bad_instruction: keywords of"),
        (["keywords:existence"], [{"keywords": []}], "bad_instruction: keywords of"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], "bad_instruction: relation of"),
        (["length_constraints:number_words"], [{"num_words": "3", "relation": LESS}], "bad_instruction: num_words of"),
    ],
)
def test_data_that_cannot_be_used(names: Any, kwargs: Any, reason: str) -> None:
    with pytest.raises(CannotJudgeError, match=f"^{reason}"):
        judge("x", names, kwargs)


def test_sentences() -> None:
    assert count_sentences("Dr. Smith met J. R. Jones. They spoke! Did they? Yes") == 4
    assert count_sentences("He paid 3.5 dollars... and left.") == 2
    assert count_sentences("一。二。三") == 3
    assert count_sentences("") == 0
    assert count_sentences("...") == 0
