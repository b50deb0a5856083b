"""Problems from a user's files: columns, GSM8K's form, bad rows, held-out splits."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED
from pydantic import ValidationError
from table_fixture import good, jsonl, write

from rlkit.data.base import DataError
from rlkit.data.files import FileSource, HfSource
from rlkit.data.rows import question_key

GSM8K = SHARED / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="needs ../shared/data/gsm8k")


@needs_gsm8k
def test_gsm8k_loads_with_no_further_key() -> None:
    source = jsonl(GSM8K / "train.jsonl")
    assert source.check() == []
    assert source.provides() == {"answer", "references"}
    train, bad = source.load("train")
    heldout, heldout_bad = source.load("heldout")
    assert bad == []
    assert heldout_bad == []
    assert len(train) + len(heldout) == 7473
    assert 0.04 < len(heldout) / 7473 < 0.06
    assert not {question_key(p) for p in train} & {question_key(p) for p in heldout}
    first = train[0]
    assert first.answer == "72"
    assert first.origin == "train.jsonl:1"
    assert "<<" not in first.references[0]
    assert first.references[0].endswith("#### 72")


@needs_gsm8k
def test_gsm8k_heldout_file_and_the_same_through_datasets() -> None:
    paths = {"path": str(GSM8K / "train.jsonl"), "heldout_path": str(GSM8K / "test.jsonl")}
    ours = FileSource(FileSource.Config(**paths), seed=0)
    theirs = HfSource(HfSource.Config(**paths), seed=0)
    assert theirs.check() == []
    for split in ("train", "heldout"):
        a, b = ours.load(split)[0], theirs.load(split)[0]
        assert [p.id for p in a] == [p.id for p in b]
        assert a == b
    assert len(ours.load("heldout")[0]) == 1319


def test_gsm8k_form(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", good(40))
    (problem, *_), _ = jsonl(path, heldout_share=0.1).load("train")
    assert problem.references == ("0 + 1 = 1\n#### 1",)
    (raw, *_), _ = jsonl(path, heldout_share=0.1, strip_annotations=False).load("train")
    assert "<<0+1=1>>" in raw.references[0]
    assert raw.answer == problem.answer == "1"


def test_columns(tmp_path: Path) -> None:
    rows = [
        {
            "uid": i,
            "chat": [{"role": "user", "content": f"q{i}"}],
            "gold": 72.0 if i else 0.5,
            "good": [f"a{i}", f"b{i}"],
            "best": f"c{i}",
            "tests": ["assert True"],
        }
        for i in range(4)
    ]
    source = jsonl(
        write(tmp_path / "d.jsonl", rows),
        prompt_column="chat",
        answer_column="gold",
        reference_columns=["best", "good"],
        id_column="uid",
        system_prompt="Be brief.",
    )
    assert source.check() == []
    assert source.provides() == {"answer", "references", "tests"}
    problems = sorted(source.load("train")[0] + source.load("heldout")[0], key=lambda p: p.id)
    assert [p.id for p in problems] == ["0", "1", "2", "3"]
    assert [p.answer for p in problems] == ["0.5", "72", "72", "72"]
    assert problems[1].references == ("c1", "a1", "b1")
    assert [(m.role, m.content) for m in problems[1].messages] == [("system", "Be brief."), ("user", "q1")]
    assert problems[1].columns == {"tests": ["assert True"]}


def test_one_reference_column_as_a_text_and_no_answers(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "solution": f"s{i}"} for i in range(3)]
    source = jsonl(write(tmp_path / "d.jsonl", rows), answer_column=None, reference_columns="solution")
    assert source.provides() == {"references"}
    problem = source.load("train")[0][0]
    assert problem.answer is None
    assert len(problem.references) == 1


def test_own_system_message_wins(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "q"}]
    rows = [{"question": chat, "answer": "1"}, {"question": "other", "answer": "2"}]
    path = write(tmp_path / "d.jsonl", rows)
    source = jsonl(path, heldout_path=str(write(tmp_path / "h.jsonl", good(1))), system_prompt="Yours.")
    own, plain = source.load("train")[0]
    assert [m.content for m in own.messages] == ["Mine.", "q"]
    assert [m.content for m in plain.messages] == ["Yours.", "other"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"question": "cut of', "broken JSON"),
        ("[1, 2]", "a JSON list"),
        ("17", "a JSON int"),
        ({"answer": "#### 1"}, "no column 'question'"),
        ({"qeustion": "q", "answer": "#### 1"}, "did you mean 'qeustion'"),
        ({"question": "", "answer": "#### 1"}, "question is empty"),
        ({"question": 3, "answer": "#### 1"}, "not int"),
        ({"question": [], "answer": "#### 1"}, "question is an empty list"),
        ({"question": ["q"], "answer": "#### 1"}, "chat message"),
        ({"question": [{"role": "user"}], "answer": "#### 1"}, "no 'content'"),
        ({"question": [{"role": "assistant", "content": "hi"}], "answer": "#### 1"}, "ends with an assistant message"),
        ({"question": "q", "answer": None}, "answer is null"),
        ({"question": "q \ud83d", "answer": "#### 1"}, "question has half of a character"),
        ({"question": "q", "answer": ["1"]}, "answer must be a text"),
        ({"question": "q", "answer": True}, "answer must be a text, not bool"),
        ({"question": "q", "answer": "so it is ####  "}, "nothing after ####"),
        ({"question": "q", "answer": "She sold 24"}, "no #### with the final answer"),
    ],
)
def test_bad_row_is_named_with_file_and_line_and_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    rows: list[Any] = good(60)
    rows.insert(11, row)
    rows.insert(5, "")  # blank lines are no rows, but lines
    source = jsonl(write(tmp_path / "d.jsonl", rows), max_bad_row_share=0.02)
    train, bad = source.load("train")
    assert [b.origin for b in bad] == ["d.jsonl:13"]
    assert reason in bad[0].reason
    assert len(train) + len(source.load("heldout")[0]) == 60


def test_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", good(30))
    path.write_bytes(path.read_bytes() + b'{"question": "\xff", "answer": "#### 1"}\n')
    _, bad = jsonl(path, max_bad_row_share=0.1).load("train")
    assert bad[0].origin == "d.jsonl:31"
    assert "UTF-8" in bad[0].reason


def test_duplicate_ids(tmp_path: Path) -> None:
    rows = [row | {"id": f"p{i}"} for i, row in enumerate(good(20))]
    rows[7]["id"] = "p3"
    _, bad = jsonl(write(tmp_path / "d.jsonl", rows), id_column="id", max_bad_row_share=0.1).load("train")
    assert bad[0].origin == "d.jsonl:8"
    assert "d.jsonl:4" in bad[0].reason


def test_too_many_bad_rows(tmp_path: Path) -> None:
    rows: list[Any] = good(93) + ["{"] * 7
    with pytest.raises(DataError) as caught:
        jsonl(write(tmp_path / "d.jsonl", rows)).load("train")
    message = str(caught.value)
    assert "7 of 100 rows" in message
    assert "d.jsonl:94: broken JSON" in message
    assert "and 2 more" in message
    assert "data.max_bad_row_share=0.07" in message
    assert len(jsonl(tmp_path / "d.jsonl", max_bad_row_share=0.07).load("train")[1]) == 7


def test_no_good_row_is_an_error_whatever_the_share(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no line that is a JSON object; the first: d.jsonl:1"):
        jsonl(write(tmp_path / "d.jsonl", ["{", "{"]), max_bad_row_share=1.0).load("train")
    with pytest.raises(DataError, match="is empty"):
        jsonl(write(tmp_path / "e.jsonl", [])).load("train")


def test_training_on_a_heldout_question_is_a_bad_row(tmp_path: Path) -> None:
    train, heldout = good(50), [*good(51)[50:], {"question": " what  IS 3 + 1?", "answer": "#### 4"}]
    paths = {"path": write(tmp_path / "t.jsonl", train), "heldout_path": str(write(tmp_path / "h.jsonl", heldout))}
    kept, bad = jsonl(**paths, max_bad_row_share=0.02).load("train")
    assert len(kept) == 49
    assert bad[0].origin == "t.jsonl:4"
    assert "h.jsonl:2" in bad[0].reason
    with pytest.raises(DataError, match="held out"):
        jsonl(**paths).load("train")


def test_share_split_keeps_equal_questions_together_and_does_not_depend_on_order(tmp_path: Path) -> None:
    rows = good(50) * 2
    forward = jsonl(write(tmp_path / "a.jsonl", rows), heldout_share=0.2)
    backward = jsonl(write(tmp_path / "b.jsonl", rows[::-1]), heldout_share=0.2)
    heldout = {question_key(p) for p in forward.load("heldout")[0]}
    assert len(heldout) == 10
    assert len(forward.load("heldout")[0]) == 20
    assert heldout == {question_key(p) for p in backward.load("heldout")[0]}
    assert not heldout & {question_key(p) for p in forward.load("train")[0]}
    other = jsonl(tmp_path / "a.jsonl", heldout_share=0.2, heldout_seed=1)
    assert heldout != {question_key(p) for p in other.load("heldout")[0]}


def test_check_proposes_the_nearest_column(tmp_path: Path) -> None:
    messages = jsonl(write(tmp_path / "d.jsonl", good(3)), prompt_column="qestion", id_column="uuid").check()
    assert len(messages) == 2
    assert "'qestion'" in messages[0]
    assert "Did you mean 'question'?" in messages[0]
    assert "data.id_column" in messages[1]


def test_check_names_unreadable_files(tmp_path: Path) -> None:
    assert "no such file" in jsonl(tmp_path / "absent.jsonl").check()[0]
    assert "is a folder" in jsonl(tmp_path).check()[0]
    (tmp_path / "list.jsonl").write_text(json.dumps(good(3), indent=1))
    assert "is one list must be named .json" in jsonl(tmp_path / "list.jsonl").check()[0]
    both = jsonl(tmp_path / "absent.jsonl", heldout_path=str(tmp_path / "gone.jsonl")).check()
    assert len(both) == 2
    assert "data.heldout_path" in both[1]


def test_gzip_whole_and_truncated(tmp_path: Path) -> None:
    plain = "".join(json.dumps(row) + "\n" for row in good(2000)).encode()
    whole = tmp_path / "d.jsonl.gz"
    whole.write_bytes(gzip.compress(plain))
    assert len(jsonl(whole).load("train")[0]) == 1900
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be read after line"):
        jsonl(whole).load("train")


def test_keys_that_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="no effect with heldout_path"):
        FileSource.Config(path="a", heldout_path="b", heldout_share=0.1)
    with pytest.raises(ValidationError, match="exclude each other"):
        HfSource.Config(path="a/b", heldout_split="test", heldout_share=0.1)


def test_rows_are_judged_before_the_run_and_not_the_first_alone(tmp_path: Path) -> None:
    rows = good(40)
    for row in rows[1::2]:
        del row["answer"]
    [message] = jsonl(write(tmp_path / "d.jsonl", rows)).check()
    assert "20 of 40 rows cannot be used" in message
    file = write(tmp_path / "e.jsonl", good(40))
    [same] = jsonl(file, heldout_path=str(file)).check()
    assert "both training and held-out data" in same


def test_import_is_light() -> None:
    code = (
        "import sys, rlkit.data.files, rlkit.data.rendering, rlkit.data.order;"
        "print(sorted({'torch', 'transformers', 'datasets', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
