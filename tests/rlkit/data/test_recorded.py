"""Sources of recorded responses: every accepted form of a row, and what is said of the others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED
from pydantic import ValidationError
from table_fixture import write

from rlkit.data.base import DataSource, Problem
from rlkit.data.files import HfSource
from rlkit.data.recorded import ChatSource, PairsSource, ResponsesSource
from rlkit.experience import Message, PreferencePair

SOLUTIONS = SHARED / "data" / "gsm8k" / "model_solutions.jsonl"
EXAMPLES = Path(__file__).parents[3] / "examples" / "own_data" / "recorded"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def read(kind: type[HfSource], folder: Path, *rows: Any, **options: Any) -> tuple[list[Problem], dict[str, str]]:
    """Problems of these rows, of which the first, with another question, is held out; and the reasons of bad ones."""
    heldout = write(folder / "heldout.jsonl", [json.dumps(rows[0]).replace("1+1?", "held out?")])
    config = {"heldout_path": str(heldout), "max_bad_row_share": 0.99} | options
    source = kind(kind.Config(path=str(write(folder / "rows.jsonl", rows)), **config), seed=0)
    problems, bad = source.load("train")
    return problems, {row.origin: row.reason for row in bad}


def told(problem: Problem) -> tuple[list[str], list[tuple[list[str], float]]]:
    """Contents of the prompt, and of each response with its value."""
    responses = [([m.content for m in response.messages], response.value) for response in problem.responses]
    return [message.content for message in problem.messages], responses


PAIR = (["1+1?"], [(["2"], 1.0), (["3"], 0.0)])
CONVERSATIONS = {
    "chosen": [user("1+1?"), assistant("2")],
    "rejected": [user("1+1?"), assistant("3")],
}
SYSTEM = {"role": "system", "content": "Add."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, PAIR),
        ({"question": "1+1?", "chosen": "2", "rejected": "3"}, PAIR),
        ({"prompt": [user("1+1?")], "chosen": [assistant("2")], "rejected": [assistant("3")]}, PAIR),
        (CONVERSATIONS, PAIR),
        (CONVERSATIONS | {"prompt": "1+1?"}, PAIR),
        ({"prompt": "1+1?", "chosen": {"from": "gpt", "value": "2"}, "rejected": assistant("3")}, PAIR),
        (
            {"prompt": "1+1?"} | {k: [SYSTEM, *v] for k, v in CONVERSATIONS.items()},
            (["Add.", "1+1?"], [(["2"], 1.0), (["3"], 0.0)]),
        ),
        ({"prompt": [SYSTEM, user("1+1?")]} | CONVERSATIONS, (["Add.", "1+1?"], [(["2"], 1.0), (["3"], 0.0)])),
        (
            {
                "chosen": [user("1?"), assistant("1"), user("1+1?"), assistant("2"), user("sure?"), assistant("yes")],
                "rejected": [user("1?"), assistant("1"), user("1+1?"), assistant("3")],
            },
            (["1?", "1", "1+1?"], [(["2", "sure?", "yes"], 1.0), (["3"], 0.0)]),
        ),
    ],
)
def test_forms_of_a_pair(tmp_path: Path, row: Any, expected: Any) -> None:
    (problem,), bad = read(PairsSource, tmp_path, row)
    assert bad == {} and told(problem) == expected
    assert problem.pairs == (PreferencePair(0, 1),)
    assert {response.origin for response in problem.responses} == {problem.origin} == {"rows.jsonl:1"}


def test_a_pairs_numbers_and_other_columns(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "chosen": "2", "rejected": "3", "p": 0.75, "m": -1.5, "w": 2, "gold": 2, "level": "easy"}
    columns = {"probability_column": "p", "margin_column": "m", "weight_column": "w", "answer_column": "gold"}
    (problem,), _ = read(PairsSource, tmp_path, row, **columns, system_prompt="Add.")
    assert problem.pairs == (PreferencePair(0, 1, 0.75, -1.5, 2.0),)
    assert problem.answer == "2" and problem.columns == {"level": "easy"}
    assert problem.messages == (Message("system", "Add."), Message("user", "1+1?"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "?", "chosen": "2", "rejected": "2"}, "chosen and rejected are equal"),
        ({"prompt": "?", "chosen": "2"}, "no column 'rejected' (it has prompt, chosen)"),
        ({"prompt": "?", "chosen": "2", "rejected": " "}, "rejected is empty"),
        ({"prompt": "?", "chosen": "2", "rejected": None}, "rejected is null"),
        ({"prompt": "?", "chosen": "2", "rejected": "\ud83d 3"}, "rejected has half of a character"),
        ({"prompt": "?", "chosen": "2", "rejected": []}, "rejected is an empty list"),
        ({"prompt": "?", "chosen": "2", "rejected": 3}, "rejected must be a list of chat messages, not int"),
        ({"prompt": [], "chosen": "2", "rejected": "3"}, "prompt is an empty list"),
        ({"chosen": "2", "rejected": "3"}, "chosen has no prompt before it, and the row has none"),
        ({"chosen": [user("a"), assistant("2")], "rejected": [user("b"), assistant("3")]}, "differ (message 1)"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "chosen does not end with a message of the assistant"),
        (
            {"chosen": CONVERSATIONS["chosen"], "rejected": [*CONVERSATIONS["chosen"], user("b"), assistant("c")]},
            "one of chosen and rejected is the beginning of the other",
        ),
        (CONVERSATIONS | {"prompt": "2+2?"}, "chosen is a conversation that does not begin with the prompt"),
        ({"prompt": "?", "chosen": "2", "rejected": "3", "p": 1.5}, "p is 1.5, not between 0 and 1"),
        ({"prompt": "?", "chosen": "2", "rejected": "3", "p": "high"}, "p must be a finite number, not 'high'"),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"prompt": "1+1?", "chosen": "2", "rejected": "3", "p": 1}
    options = {"probability_column": "p"} if "p" in row else {}
    problems, bad = read(PairsSource, tmp_path, good, row, **options)
    assert len(problems) == 1 and list(bad) == ["rows.jsonl:2"]
    assert reason in bad["rows.jsonl:2"]


def test_rows_of_one_prompt_are_one_problem(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1?", "completion": "2", "label": True, "model": "a", "level": 1},
        {"prompt": "2+2?", "completion": "4", "label": True, "model": "a", "level": 1},
        {"prompt": "1+1?", "completion": "3", "label": False, "model": "b", "level": 1},
    ]
    problems, bad = read(ResponsesSource, tmp_path, *rows)
    assert bad == {}
    assert [told(problem) for problem in problems] == [
        (["1+1?"], [(["2"], 1.0), (["3"], 0.0)]),
        (["2+2?"], [(["4"], 1.0)]),
    ]
    assert [response.origin for response in problems[0].responses] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert problems[0].rows == 2 and problems[0].columns == {"level": 1}


def test_an_id_gathers_its_rows_and_has_one_prompt(tmp_path: Path) -> None:
    asked = (("1+1?", "2"), ("1+1?", "3"), ("2+2?", "4"))
    rows = [{"id": 1, "prompt": prompt, "response": response, "score": 1} for prompt, response in asked]
    (problem,), bad = read(ResponsesSource, tmp_path, *rows, id_column="id")
    assert problem.id == "1" and len(problem.responses) == 2
    assert bad == {"rows.jsonl:3": "id '1' was already used by rows.jsonl:1 with another prompt"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1?", "completions": ["2", "3"], "correctness": [1, 0.5]},
        {"prompt": "1+1?", "responses": [[assistant("2")], [assistant("3")]], "scores": [1, 0.5]},
        {"responses": [[user("1+1?"), assistant(text)] for text in "23"], "rewards": [1.0, 0.5]},
        {"question": "1+1?", "a": {"solution": "2", "is_correct": 1}, "b": {"solution": "3", "is_correct": 0.5}},
    ],
)
def test_several_responses_in_a_row(tmp_path: Path, row: Any) -> None:
    (problem,), bad = read(ResponsesSource, tmp_path, row)
    assert bad == {} and told(problem) == (["1+1?"], [(["2"], 1.0), (["3"], 0.5)])


def test_labels_and_scores_by_name(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "completion": "2", "stars": 7.5, "label": 1, "w": 0.5}
    (problem,), _ = read(ResponsesSource, tmp_path, row, score_column="stars", weight_column="w")
    assert (problem.responses[0].value, problem.responses[0].weight) == (7.5, 0.5)
    with pytest.raises(ValidationError, match="exclude each other"):
        ResponsesSource.Config(path="x", label_column="a", score_column="b")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "?", "completion": "2", "label": 2}, "label must be true, false or a number from 0 to 1, not 2"),
        ({"prompt": "?", "completion": "2", "label": "yes"}, "not 'yes'"),
        ({"prompt": "?", "completion": "2"}, "no column 'label'"),
        ({"prompt": "?", "completion": [], "label": []}, "completion is an empty list"),
        ({"prompt": "?", "completion": ["2", "3"], "label": [1]}, "must be lists of equal length"),
        ({"prompt": "?", "completion": ["2"], "label": 1}, "must be lists of equal length"),
        ({"completion": "2", "label": 1}, "completion has no prompt before it"),
        (
            {"completion": [[user("a"), assistant("2")], [user("b"), assistant("2")]], "label": [1, 0]},
            "its responses have different prompts",
        ),
    ],
)
def test_responses_that_cannot_be_used(tmp_path: Path, row: Any, reason: str) -> None:
    problems, bad = read(ResponsesSource, tmp_path, {"prompt": "1+1?", "completion": "2", "label": 1}, row)
    assert len(problems) == 1 and reason in bad["rows.jsonl:2"]


def test_solutions_of_four_models_need_no_further_key() -> None:
    if not SOLUTIONS.is_file():
        pytest.skip("needs ../shared/data/gsm8k/model_solutions.jsonl")
    source = ResponsesSource(ResponsesSource.Config(path=str(SOLUTIONS)), seed=0)
    assert source.check() == []
    assert {"responses", "labels", "ground_truth"} <= source.provides()
    problems = source.load("train")[0] + source.load("heldout")[0]
    rows = [json.loads(line) for line in SOLUTIONS.read_text().splitlines()]
    assert sum(len(problem.responses) for problem in problems) == 4 * len(rows)
    right = sum(row[name]["is_correct"] for row in rows for name in row if isinstance(row[name], dict))
    assert sum(response.value for problem in problems for response in problem.responses) == right


CHAT = [SYSTEM, user("1+1?"), assistant("2"), user("sure?"), assistant("yes")]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt", "system": "system"}[m["role"]], "value": m["content"]} for m in CHAT
]


@pytest.mark.parametrize(
    ("row", "options", "prompt", "answer", "trained"),
    [
        ({"messages": CHAT}, {}, ["Add.", "1+1?"], ["2", "sure?", "yes"], (True, False, True)),
        ({"conversations": SHAREGPT}, {}, ["Add.", "1+1?"], ["2", "sure?", "yes"], (True, False, True)),
        ({"messages": CHAT}, {"train_on": "last"}, ["Add.", "1+1?", "2", "sure?"], ["yes"], (True,)),
        ({"conversations": SHAREGPT[1:], "system": "Add."}, {"train_on": "last"}, ["Add.", "1+1?", "2", "sure?"],
         ["yes"], (True,)),
        ({"messages": [*CHAT[:2], CHAT[2] | {"weight": 0}, CHAT[3], CHAT[4] | {"weight": 1}]}, {},
         ["Add.", "1+1?", "2", "sure?"], ["yes"], (True,)),
        ({"messages": [*CHAT[:2], CHAT[2] | {"train": True}, *CHAT[3:]]}, {}, ["Add.", "1+1?"], ["2"], (True,)),
        ({"messages": [*CHAT, user("thanks")]}, {"train_on": "last"}, ["Add.", "1+1?", "2", "sure?"], ["yes"], (True,)),
        ({"prompt": "1+1?", "completion": "2"}, {}, ["1+1?"], ["2"], (True,)),
        ({"prompt": CHAT[:2], "response": CHAT[2:]}, {}, ["Add.", "1+1?"], ["2", "sure?", "yes"], (True, False, True)),
    ],
)  # fmt: skip
def test_forms_of_a_conversation(
    tmp_path: Path, row: Any, options: Any, prompt: Any, answer: Any, trained: tuple[bool, ...]
) -> None:
    (problem,), bad = read(ChatSource, tmp_path, row, **options)
    assert bad == {} and told(problem) == (prompt, [(answer, 1.0)])
    assert problem.responses[0].trained == trained


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [user("?")]}, "no message of the assistant is trained on"),
        ({"messages": CHAT[2:]}, "begins with a message of the assistant"),
        (
            {"messages": [user("?"), assistant("a"), assistant("b") | {"train": True}]},
            "2 and 3 are both the assistant's",
        ),
        ({"messages": [user("?"), assistant("a") | {"weight": 0.5}]}, "messages[1].weight must be 0, 1, true or false"),
        ({"messages": [user("?"), {"role": "assistant"}]}, "messages[1] has no 'content'"),
        ({"messages": [user("?"), {"role": "assistant", "content": None}]}, "must be a text, not NoneType"),
        ({"messages": [user("?"), assistant("") | {"tool_calls": [{}]}]}, "has tool calls"),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, "it has tools"),
        ({"messages": [user("?"), assistant(" ")]}, "message 2 is an empty answer"),
        (
            {"conversations": [{"from": "human", "value": "?"}, {"from": "bot", "value": "2"}]},
            "conversations[1].from is 'bot', which is not a known role: "
            "assistant, function_call, gpt, human, observation",
        ),
        (
            {"text": "all in one", "id": None},
            "none of messages, conversations, conversation, or a prompt with one of response, completion, solution (it "
            "has text)",
        ),
    ],
)
def test_conversations_that_cannot_be_used(tmp_path: Path, row: Any, reason: str) -> None:
    problems, bad = read(ChatSource, tmp_path, {"messages": CHAT}, row)
    assert len(problems) == 1 and reason in bad["rows.jsonl:2"]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "csv"])
def test_every_place_gives_the_same_pairs(tmp_path: Path, form: str) -> None:
    import datasets

    rows = [{"prompt": f"{i}+1?", "chosen": f"{i + 1}", "rejected": "0", "p": 0.5 + i / 100} for i in range(40)]
    table, path = datasets.Dataset.from_list(rows), tmp_path / f"rows.{form}"
    match form:
        case "jsonl":
            write(path, rows)
        case "parquet":
            table.to_parquet(path)
        case "csv":
            table.to_csv(path)
        case _:
            datasets.DatasetDict({"train": table}).save_to_disk(path)
    source = PairsSource(PairsSource.Config(path=str(path), probability_column="p", heldout_share=0.25), seed=0)
    assert source.check() == []
    assert source.provides() == {"responses", "pairs", "labels"}
    problems = source.load("train")[0]
    assert (len(problems), len(source.load("heldout")[0])) == (30, 10)
    for problem in problems:
        number = int(problem.messages[0].content.partition("+")[0])
        assert told(problem)[1] == [([f"{number + 1}"], 1.0), (["0"], 0.0)]
        assert problem.pairs == (PreferencePair(0, 1, pytest.approx(0.5 + number / 100)),)


def test_too_many_unusable_rows_are_refused_before_a_run(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "a" if i % 2 else "b"} for i in range(20)]
    source = PairsSource(PairsSource.Config(path=str(write(tmp_path / "rows.jsonl", rows))), seed=0)
    (message,) = source.check()
    assert "10 of 20 rows cannot be used" in message and "rows.jsonl:2: chosen and rejected are equal" in message
    source = PairsSource(PairsSource.Config(path=str(tmp_path / "rows.jsonl"), chosen_column="chose"), seed=0)
    assert "has no column 'chose'. Did you mean 'chosen'?" in source.check()[0]
    texts = ResponsesSource(ResponsesSource.Config(path=str(write(tmp_path / "t.jsonl", [{"text": "x"}]))), seed=0)
    assert "no column with a response (it has text); name it with data.response_column" in texts.check()[0]
    assert texts.provides() == {"responses", "text"}


def test_labels_of_another_kind_may_not_be_skipped(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": "a", "label": 1 if i % 3 else -1} for i in range(21)]
    source = ResponsesSource(ResponsesSource.Config(path=str(write(tmp_path / "rows.jsonl", rows))), seed=0)
    (message,) = source.check()
    assert "7 of 21 rows cannot be used" in message and "rows.jsonl:1: label must be true, false or a number" in message
    assert "Write labels as true or false, or as numbers from 0 (bad) to 1 (good)" in message
    assert "allow more with" not in message


def test_the_remedy_names_the_columns_that_are_wrong(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": None, "gold": "a"} for i in range(3)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    (message,) = PairsSource(PairsSource.Config(path=path, answer_column="gold"), seed=0).check()
    assert message.endswith("\nCorrect these rows, or name other columns (data.rejected_column).")


def test_what_is_done_with_rows_is_said(tmp_path: Path) -> None:
    late = {"role": "system", "content": "Be brief."}
    chats = [[SYSTEM, user(f"{i}+1?"), *CHAT[2:]] for i in range(8)]
    rows = [{"messages": chat} for chat in [*chats[:5], *([*chat, user("thanks")] for chat in chats[5:7])]]
    rows += [{"messages": [*chats[7][:3], late, *chats[7][3:]]}, {"messages": [user("?")]}]
    options = {"path": str(write(tmp_path / "rows.jsonl", rows)), "max_bad_row_share": 0.2, "heldout_share": 0.5}
    source = ChatSource(ChatSource.Config(**options), seed=0)
    assert source.check() == []
    skipped, *noted = source.notes()
    assert skipped.endswith("are skipped:\n  rows.jsonl:9: no message of the assistant is trained on")
    assert noted == [
        "2 conversations end with a message of the user, which is left out (the first: rows.jsonl:6)",
        "1 conversations have a system message after the beginning, which is rendered in place "
        "(the first: rows.jsonl:8)",
    ]
    loading = ChatSource(ChatSource.Config(**options), seed=0)
    loading.load("train")
    assert loading.notes() == noted, "the skipped rows are reported with those that rendering skips"


@pytest.mark.parametrize(
    ("kind", "name"), [(PairsSource, "pairs"), (ResponsesSource, "responses"), (ChatSource, "chat")]
)
def test_the_examples_are_read(kind: type[HfSource], name: str) -> None:
    files = sorted(EXAMPLES.glob(f"{name}*.jsonl"))
    assert files
    for file in files:
        source: DataSource = kind(kind.Config(path=str(file), heldout_share=0.5), seed=0)
        assert source.check() == [] and source.load("train")[1] == []


def test_the_docs_name_every_example() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    named = set(re.findall(r"\| `(\w+\.jsonl)` \|", page))
    assert named == {file.name for file in EXAMPLES.glob("*.jsonl")}


def test_what_examples_say_besides_texts() -> None:
    def problems(kind: type[HfSource], name: str, **options: Any) -> list[Problem]:
        source = kind(kind.Config(path=str(EXAMPLES / name), heldout_share=0.5, **options), seed=0)
        return sorted([*source.load("train")[0], *source.load("heldout")[0]], key=lambda problem: problem.origin)

    numbers = {"probability_column": "preferred", "margin_column": "better_by", "weight_column": "votes"}
    pairs = [pair for problem in problems(PairsSource, "pairs_numbers.jsonl", **numbers) for pair in problem.pairs]
    assert pairs == [PreferencePair(0, 1, 0.7, 0.4, 3), PreferencePair(0, 1, 1.0, 2.5, 1)]
    scored = problems(ResponsesSource, "responses_scores.jsonl")
    assert [[response.value for response in problem.responses] for problem in scored] == [[4.5, -2], [3]]
    late, early = problems(ChatSource, "chat_trained_turns.jsonl")
    assert told(late) == (["What is 17 + 25?", "41?", "Look again."], [(["42"], 1.0)])
    assert told(early) == (["What is 9 - 4?"], [(["5"], 1.0)])
