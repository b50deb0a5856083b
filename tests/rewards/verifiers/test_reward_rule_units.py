"""Mathematical answers in the forms people write them: right and wrong pairs, with and without `strip_units`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence

import pytest
from paths import SHARED

from rewards.base import RewardContext
from rewards.verifiers.answers import final_answer, gold_answer
from rewards.verifiers.comparison import decide
from rewards.verifiers.math import MathReward
from rewards.verifiers.units import split_unit
from rlkit.experience import Score

GSM8K = SHARED / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="../shared/data/gsm8k is not there")
MATH = {"markers": ("boxed", "####", "answer is"), "strip_units": True}

RIGHT = [
    ("12.00", "12"),
    ("1{,}234", "1234"),
    ("1,234,567", "1234567"),
    ("1.5e3", "1500"),
    ("10^3", "1000"),
    (".75", "3/4"),
    ("1 1/2", "3/2"),
    (r"2\frac{1}{3}", "7/3"),
    (r"\frac12", "0.5"),
    (r"\dfrac{3}{4}", r"\frac{3}{4}"),
    ("3/4", r"\tfrac34"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    ("0.333333", "1/3"),
    (r"50\%", "50"),
    ("50%", r"50\%"),
    (r"\$5.00", "5"),
    ("$12$", "12"),
    (r"90^\circ", "90"),
    ("5 cm", "5"),
    (r"5\text{ cm}", "5"),
    (r"5\,\mathrm{cm}", "5"),
    (r"25\text{ percent}", "25"),
    (r"5\text{ km/h}", "5"),
    ("7,000 miles", "7000"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    ("x=5", "5"),
    ("y = 2x+1", "2x+1"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(1,2)", "(1, 2)"),
    ("(1,2,3)", r"\left(1,2,3\right)"),
    ("1,2,3", "1, 2, 3"),
    ("3,1,2", "1,2,3"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty, 3]", r"(-\infty,3]"),
    (r"[0,1] \cup [2,3]", r"[0,1]\cup[2,3]"),
    (r"x \in [1,2]", "[1,2]"),
    (r"\infty", r"\infty"),
    (r"3\pm 2", r"3 \pm 2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\text{east}", "east"),
    (r"\text{(B)}", "B"),
    ("5:30", "5:30"),
]
WRONG = [
    ("5", "6"),
    ("-5", "5"),
    ("500", "5"),
    ("42", "4"),
    ("10", "10.01"),
    ("1,234", "1235"),
    ("0.33", "1/3"),
    ("1/2", "1/3"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    ("50%", "5"),
    ("5 cm", "6"),
    ("2^{10}", "1000"),
    (r"\sqrt{2}", "2"),
    (r"2\pi", "2"),
    ("3k", "3"),
    ("x+1", "x-1"),
    ("x>2", "x<2"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,2,3)"),
    ("1,2", "1,3"),
    ("1", "1,2"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("[0,1)", "[0,1]"),
    ("(0,1)", "(0,1]"),
    ("(0,1)", "[0,1]"),
    ("[0,1]", "[0,2]"),
    (r"[0,1] \cup [2,3]", "[0,1]"),
    (r"\infty", r"-\infty"),
    ("east", "west"),
    (r"\text{B}", "A"),
    ("5:30", "6:30"),
]
RIGHT_WITHOUT_UNITS = [
    ("5 dollars", "5"),
    ("12 m^2", "12"),
    ("36 square units", "36"),
    ("$5.50 per hour", "5.5"),
    ("3 m", "3"),
    ("90°", "90"),
    ("5", "5 dollars"),
]
WRONG_WITHOUT_UNITS = [
    ("6 km", "5"),
    ("3", "3k"),
    ("3k", "3m"),
    ("2 pi", "2"),
    ("5 million", "5"),
    ("2x", "2"),
    ("5k", "5"),
]


@pytest.fixture(scope="module")
def plain() -> Iterator[MathReward]:
    yield from _started(MathReward.Config())


@pytest.fixture(scope="module")
def math() -> Iterator[MathReward]:
    yield from _started(MathReward.Config.model_validate(MATH))


def _started(config: MathReward.Config) -> Iterator[MathReward]:
    reward = MathReward(config, RewardContext())
    reward.start()
    yield reward
    reward.close()


def _judge(reward: MathReward, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    return reward.judge([rf"So it is \boxed{{{answer}}}." for answer, _ in pairs], [gold for _, gold in pairs])


@pytest.mark.parametrize("name", ["plain", "math"])
def test_right_and_wrong_pairs(name: str, request: pytest.FixtureRequest) -> None:
    reward = request.getfixturevalue(name)
    for pairs, expected in ((RIGHT, 1.0), (WRONG, 0.0)):
        scores = _judge(reward, pairs)
        assert [(pair, s.value, s.trace) for pair, s in zip(pairs, scores, strict=True) if s.value != expected] == []


@pytest.mark.parametrize("filler", [" " * 100_000, " " * 200, " a" * 50_000, "1" * 100_000, "ab " * 100_000])
def test_a_long_answer_is_not_searched_for_a_unit(filler: str) -> None:
    began = time.perf_counter()
    assert split_unit(f"5{filler}!") == (f"5{filler}!", None)
    assert time.perf_counter() - began < 0.2


def test_units_do_not_matter_where_one_side_has_none(plain: MathReward, math: MathReward) -> None:
    for pairs, expected in ((RIGHT_WITHOUT_UNITS, 1.0), (WRONG_WITHOUT_UNITS, 0.0)):
        scores = _judge(math, pairs)
        assert [(pair, s.value, s.trace) for pair, s in zip(pairs, scores, strict=True) if s.value != expected] == []
    # A bare letter may be a variable: a unit only where `strip_units` says so, or the other side has one.
    pairs = [("5 dollars", "5"), ("12 m^2", "12"), ("12 m", "12 km"), ("12 m", "0.012 km")]
    assert [score.value for score in _judge(plain, pairs)] == [1.0, 0.0, 0.0, 1.0]
    assert [score.value for score in _judge(math, pairs)] == [1.0, 1.0, 0.0, 1.0]


def test_units_are_taken_off_one_side_only() -> None:
    assert decide("12 m^2", "12", letters_are_units=True) == "right"
    assert decide("12", "12 square feet") == "right"
    assert decide("12 m", "12 km") == "wrong"
    assert decide("x+1", "12") == ("x+1", "12")


def test_markers_can_be_chosen() -> None:
    text = "The answer is 1\n#### 2\nA: 3"
    assert final_answer(text).text == "3"  # type: ignore[union-attr]
    assert final_answer(text, markers=("####",)).text == "2"  # type: ignore[union-attr]
    assert final_answer(text, markers=("answer is",)).text == "1"  # type: ignore[union-attr]
    assert final_answer(text, markers=("boxed",)) is None
    reward = MathReward(MathReward.Config(markers=("boxed",)), RewardContext())
    marked, unmarked = reward.judge([r"\boxed{2}", "#### 2"], ["#### 2"] * 2)
    reward.close()
    assert (marked.value, unmarked.value) == (1.0, 0.0)
    assert unmarked.components == {"correct": 0.0, "format": 0.0}


@needs_gsm8k
def test_math_and_gsm8k_options_agree_with_the_yardstick_on_real_solutions(plain: MathReward) -> None:
    rows = [json.loads(line) for line in (GSM8K / "model_solutions.jsonl").read_text().splitlines()[::5]]
    texts = [row["175b_verification"]["solution"] for row in rows]
    labels = [float(row["175b_verification"]["is_correct"]) for row in rows]
    golds = [row["ground_truth"] for row in rows]
    gsm8k = MathReward(MathReward.Config(markers=("####", "A:"), strip_units=True), RewardContext())
    for reward in (plain, gsm8k):
        found = [score.value for score in reward.judge(texts, golds)]
        assert sum(a == b for a, b in zip(found, labels, strict=True)) >= 0.995 * len(labels)
    gsm8k.close()
    assert gold_answer(golds[0]).isdigit()
