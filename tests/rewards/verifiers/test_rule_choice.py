"""Multiple choice: which option a response chooses."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.base import RewardContext
from rewards.verifiers.choice import MultipleChoice, chosen_option
from rewards.verifiers.pool import CannotJudgeError
from rlkit.experience import Message, Prompt

LETTERS = tuple("ABCD")
CITIES = ("London", "New York", "New York City", "Paris")
ANIMALS = ("dog", "cat", "horse", "a cow")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B) 12 cm", "B"),
        ("B. because it is red", "B"),
        ("(B) 12 cm", "B"),
        ("Answer: B", "B"),
        ("Answer: (B)", "B"),
        ("**Answer:** B) 12 cm", "B"),
        ("The answer is B.", "B"),
        ("The answer is (B), since A is too small.", "B"),
        ("The answer is B because A is too small", "B"),
        ("The answer is A", "A"),
        ("The answer is A because it is", "A"),
        ("The correct option is C.", "C"),
        ("Final answer: option C", "C"),
        ("A is too small.\nC is too big.\n\nAnswer: B", "B"),
        ("First I thought the answer is A. No: the answer is D.", "D"),
        (r"So \boxed{B}.", "B"),
        (r"So \boxed{\text{B}}.", "B"),
        (r"So \boxed{\textbf{(B)}}", "B"),
        ("#### C", "C"),
        ("Let me think. (A) is too small, (C) too big.\nSo it must be (B).", "B"),
        ("I compare them all.\n(D) 12 cm", "D"),
        ("I compare them all.\nB) 12 cm", "B"),
        ("I think it's B.", "B"),
        ("It must be option B", "B"),
        ("It is not B.", None),
        ("<think>A?</think>\n<answer>\nC\n</answer>", "C"),
        ("The final answer is: $\\boxed{C}$", "C"),
        ("Answer:\n\n(C)", "C"),
        ("Answer: C\n\nA is wrong because it is too small.", "C"),
        ("A. 4 cm\nB. 5 cm\nC. 15 cm\nD. none", None),
        ("A. 4 cm\nB. 5 cm\n\nSo it must be this:\nB. 5 cm", "B"),
        ("(A) (B) (C) (D)", None),
        ("Answer: A; B", None),
        ("Answer: A B C D", None),
        ("The answer is not B but C", None),
        ("The answer is B or C.", None),
        ("Answer: A and B", None),
        ("Answer: A, B", None),
        ("Answer: (A)/(B)", None),
        ("The answer is a dog.", None),
        ("A dog is best.", None),
        ("I do not know.", None),
        ("Both (A) and (B) fit.", None),
        ("Answer: E", None),
        ("Answer: Because", None),
        ("", None),
    ],
)
def test_letters(text: str, chosen: str | None) -> None:
    assert chosen_option(text, LETTERS) == chosen


@pytest.mark.parametrize(
    ("text", "texts", "chosen"),
    [
        ("The answer is Paris.", CITIES, "D"),
        ("paris", CITIES, "D"),
        ("The answer is New York City.", CITIES, "C"),
        ("The answer is New York.", CITIES, "B"),
        ("The answer is London or Paris.", CITIES, None),
        ("Answer: D) Paris", CITIES, "D"),
        ("The answer is a dog.", ANIMALS, "A"),
        ("The answer is a cow", ANIMALS, "D"),
        ("The answer is A cow", ANIMALS, "D"),
        ("Answer: catfish", ANIMALS, None),
        ("#### 12", ("10", "11", "12", "13"), "C"),
        ("#### $12", ("$10", "$11", "$12", "$13"), "C"),
    ],
)
def test_texts_of_options(text: str, texts: tuple[str, ...], chosen: str | None) -> None:
    assert chosen_option(text, LETTERS, texts) == chosen


def prompt(answer: str | None, options: Any = None) -> Prompt:
    return Prompt("p", (Message("user", "?"),), (1,), answer=answer, columns={"choices": options})


def reward(column: str | None = "choices") -> MultipleChoice:
    return MultipleChoice(MultipleChoice.Config(options_column=column), RewardContext())


@pytest.mark.parametrize(
    ("answer", "options", "gold"),
    [
        ("B", list(CITIES), "B"),
        ("(b)", list(CITIES), "B"),
        ("2", list(CITIES), "C"),
        ("Paris", list(CITIES), "D"),
        ("2", {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}, "2"),
        ("B", {"A": "x", "B": "y"}, "B"),
        ("B", '["x", "y"]', "B"),
        ("He thinks.\n#### C", list(CITIES), "C"),
    ],
)
def test_gold_answers(answer: str, options: Any, gold: str) -> None:
    assert reward().task(prompt(answer, options)).gold == gold


@pytest.mark.parametrize(
    ("answer", "options", "reason"),
    [
        (None, list(CITIES), "no_gold"),
        ("E", list(CITIES), "bad_gold"),
        ("7", list(CITIES), "bad_gold"),
        ("B", None, "no_column"),
        ("B", ["one"], "bad_column"),
        ("B", 3, "bad_column"),
        ("B", '["x", ', "bad_column"),
    ],
)
def test_what_cannot_be_judged(answer: str | None, options: Any, reason: str) -> None:
    with pytest.raises(CannotJudgeError, match=f"^{reason}: "):
        reward().task(prompt(answer, options))


def test_scores_and_needs() -> None:
    judge, task = MultipleChoice.judge, reward(None).task(prompt("B"))
    right, wrong, none = (judge(None, task, text) for text in ("Answer: B", "Answer: C", "who knows"))
    assert [score.value for score in (right, wrong, none)] == [1.0, 0.0, 0.0]
    assert [score.components["format"] for score in (right, wrong, none)] == [1.0, 1.0, 0.0]
    assert "chose C, gold B" in wrong.trace
    assert MultipleChoice.traits(MultipleChoice.Config()).columns == ()
    assert MultipleChoice.traits(MultipleChoice.Config(options_column="choices")).columns == ("choices",)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ABab()[]{}.:*#\\ answeriso,/\n", max_size=200))
def test_any_text_is_read(text: str) -> None:
    assert chosen_option(text, LETTERS, ANIMALS) in (None, *LETTERS)


def test_hostile_texts_are_read_in_linear_time() -> None:
    start = time.perf_counter()
    for piece in ("(A) ", "answer is ", "\\boxed{", "A or ", "- ", "((((", "* (", "answer_____"):
        chosen_option(piece * 50_000, LETTERS, CITIES)
    assert time.perf_counter() - start < 10
