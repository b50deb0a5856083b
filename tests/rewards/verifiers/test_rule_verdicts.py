"""A person's verdicts on answers of nine classes (verdicts.tsv): the rule reward has the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards.base import RewardContext
from rewards.verifiers.math import MathReward
from rlkit.experience import Score

Row = tuple[str, float, str, str]


def rows() -> list[Row]:
    lines = Path(__file__).with_name("verdicts.tsv").read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(kind, float(verdict), gold, response_of(text)) for kind, verdict, gold, text in cells]


def response_of(text: str) -> str:
    text = text.replace("⏎", "\n")
    return rf"So it is \boxed{{{text[1:]}}}." if text.startswith("□") else text


ROWS = rows()
KINDS = tuple(dict.fromkeys(kind for kind, *_ in ROWS))


def judged(options: dict[str, Any], some: Sequence[Row]) -> list[Score]:
    reward = MathReward(MathReward.Config(processes=2, **options), RewardContext())
    reward.start()
    try:
        return reward.judge([response for *_, response in some], [gold for _, _, gold, _ in some])
    finally:
        reward.close()


@pytest.fixture(scope="module")
def scores() -> list[Score]:
    return judged({}, ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_are_a_persons(scores: list[Score], kind: str) -> None:
    differing = [
        (gold, response, score.value, score.reason or score.trace)
        for (own, verdict, gold, response), score in zip(ROWS, scores, strict=True)
        if own == kind and score.value != verdict
    ]
    assert differing == []


def test_reading_bare_letters_as_units_changes_no_verdict() -> None:
    some = [row for row in ROWS if row[0] in ("units", "small", "percent", "forms")]
    scores = judged({"strip_units": True}, some)
    assert [(row, score.trace) for row, score in zip(some, scores, strict=True) if score.value != row[1]] == []


def test_the_table_has_right_and_wrong_answers_of_every_class() -> None:
    counts = Counter((kind, verdict) for kind, verdict, *_ in ROWS)
    assert len(ROWS) >= 675 and min(counts.values()) >= 5 and len(counts) == 2 * len(KINDS) == 18
