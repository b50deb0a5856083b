"""Outcome-labelled responses: every layout that such data come in, bad rows, held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED

from rlkit.data.base import DataError
from rlkit.experience import Message
from rlkit.reward_training.outcomes import OutcomeData, load_rollouts, split_rollouts, without

GSM8K = SHARED / "data" / "gsm8k" / "model_solutions.jsonl"


def load(tmp_path: Path, *rows: Any, **options: Any) -> Any:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return load_rollouts(OutcomeData(path=str(file), **options))


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def told(rollouts: Any) -> list[tuple[str, str, float]]:
    return [(r.messages[-1].content, r.response, r.label) for r in rollouts]


def test_one_response_per_row(tmp_path: Path) -> None:
    found, bad = load(
        tmp_path, {"prompt": "1+1?", "response": "2", "label": True}, {"prompt": "1+1?", "response": "3", "label": 0.25}
    )
    assert told(found) == [("1+1?", "2", 1.0), ("1+1?", "3", 0.25)] and bad == []
    assert found[0].group == found[1].group
    assert found[1].origin == "rows.jsonl:2 response"


def test_names_of_columns_and_groups_are_configurable(tmp_path: Path) -> None:
    found, _ = load(
        tmp_path,
        {"q": "1+1?", "a": "2", "ok": 1, "task": 7},
        {"q": "one and one?", "a": "2", "ok": 0, "task": 7},
        prompt_column="q",
        response_column="a",
        label_column="ok",
        group_column="task",
        system_prompt="Add.",
    )
    assert [r.group for r in found] == ["7", "7"]
    assert found[0].messages == (Message("system", "Add."), Message("user", "1+1?"))


def test_lists_of_completions(tmp_path: Path) -> None:
    found, _ = load(tmp_path, {"dataset": "x", "prompt": "1+1?", "completions": ["2", ""], "correctness": [1, False]})
    assert told(found) == [("1+1?", "2", 1.0), ("1+1?", "", 0.0)], "an empty response is a wrong one, not a bad row"


def test_a_response_that_is_a_chat_brings_its_prompt(tmp_path: Path) -> None:
    found, _ = load(tmp_path, {"response": chat("1+1?", "2"), "id": 1, "dataset": "x", "label": 1})
    assert told(found) == [("1+1?", "2", 1.0)]


def test_pairs_count_a_repeated_response_once(tmp_path: Path) -> None:
    found, _ = load(
        tmp_path,
        {"chosen": chat("1+1?", "2"), "rejected": chat("1+1?", "3")},
        {"chosen": chat("1+1?", "2"), "rejected": chat("1+1?", "4")},
        {"chosen": chat("2+1?", "3"), "rejected": chat("2+1?", "2")},
    )
    assert told(found) == [("1+1?", "2", 1), ("1+1?", "3", 0), ("1+1?", "4", 0), ("2+1?", "3", 1), ("2+1?", "2", 0)]


def test_steps_with_the_first_wrong_one(tmp_path: Path) -> None:
    found, _ = load(
        tmp_path,
        {"problem": "?", "steps": ["a", "bb"], "label": 1, "final_answer_correct": False},
        {"problem": "?", "steps": ["c"], "label": -1},
    )
    assert [(r.response, r.steps, r.first_error, r.label) for r in found] == [
        ("a\n\nbb", ((0, 3), (3, 5)), 1, 0.0),
        ("c", ((0, 1),), -1, 1.0),
    ]


def test_real_solutions_of_four_models_need_no_further_key() -> None:
    if not GSM8K.is_file():
        pytest.skip("needs ../shared/data/gsm8k/model_solutions.jsonl")
    config = OutcomeData(path=str(GSM8K))
    found, bad = load_rollouts(config)
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    assert len(found) == 4 * len(rows) == 2640 and bad == []
    right = sum(row[name]["is_correct"] for row in rows for name in row if isinstance(row[name], dict))
    assert sum(r.label for r in found) == right
    train, heldout = split_rollouts(found, config)
    assert len(heldout) == 4 * 66
    assert not {r.group for r in train} & {r.group for r in heldout}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "?", "response": "2", "label": 2}, "label must be true, false or a number from 0 to 1, not 2"),
        ({"prompt": "?", "response": "2", "label": "yes"}, "not 'yes'"),
        ({"prompt": "?", "response": "2"}, "no column 'label' (it has prompt, response)"),
        ({"prompt": "?", "response": "2", "label": None}, "label is null"),
        ({"prompt": "?", "response": "2 \ud83d", "label": 1}, "response has half of a character"),
        ({"prompt": " ", "response": "2", "label": 1}, "prompt is empty"),
        ({"prompt": "?", "response": 2, "label": 1}, "response must be a text or a chat, not int"),
        ({"response": chat("?", "2")[:1], "label": 1}, "must have a prompt and end with the assistant's message"),
        ('{"prompt": ', "broken JSON"),
        ("[1]", "a JSON list"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"prompt": "?", "response": "2", "label": 1}
    found, bad = load(tmp_path, good, row, max_bad_row_share=0.5)
    assert len(found) == 1
    assert bad[0].origin == "rows.jsonl:2" and reason in bad[0].reason
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        load(tmp_path, good, row)


def test_a_bad_row_is_bad_as_a_whole(tmp_path: Path) -> None:
    good = {"prompt": "?", "completions": ["2"], "correctness": [1]}
    row = {"prompt": "?", "completions": ["2", "3"], "correctness": [1, 7]}
    found, bad = load(tmp_path, good, row, max_bad_row_share=0.5)
    assert len(found) == 1 and "correctness[1] must be" in bad[0].reason
    row = {"prompt": "?", "completions": ["2", "3"], "correctness": [1]}
    assert "lists of equal length" in load(tmp_path, good, row, max_bad_row_share=0.5)[1][0].reason


def test_a_label_in_words_is_no_worse_response(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "answer": "It is 3", "verdict": "incorrect"}
    with pytest.raises(DataError, match="no layout fits its columns prompt, answer, verdict"):
        load(tmp_path, row, response_column="answer", label_column="verdict")


def test_columns_that_fit_no_layout_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no layout fits its columns query, answer.*data.prompt_column"):
        load(tmp_path, {"query": "?", "answer": "2"})


def test_heldout_groups_are_disjoint_and_the_same_in_any_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i // 3}?", "response": str(i), "label": i % 2} for i in range(60)]
    found, _ = load(tmp_path, *rows)
    config = OutcomeData(path="x", heldout_share=0.25)
    train, heldout = split_rollouts(found, config)
    assert len(heldout) == 15 and len(train) == 45
    assert {r.group for r in split_rollouts(found[::-1], config)[1]} == {r.group for r in heldout}
    kept, left_out = without(found, heldout)
    assert kept == train and len(left_out) == 15 and "asks the same" in left_out[0].reason
    with pytest.raises(DataError, match=r"data\.heldout_path"):
        split_rollouts(found[:3], config)
