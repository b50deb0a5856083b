"""Files by their formats, data sets, columns inside columns: what is read, and what is said of what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from table_fixture import good, jsonl, write

from rlkit.data.files import FileSource, HfSource


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "json", "folder", "saved"])
def test_hf_local_forms(tmp_path: Path, form: str) -> None:
    import datasets

    table = datasets.Dataset.from_list(good(40))
    path = tmp_path / f"d.{form}"
    match form:
        case "parquet":
            table.to_parquet(path)
        case "csv":
            table.to_csv(path)
        case "tsv":
            table.to_csv(path, sep="\t")
        case "json":
            path.write_text(json.dumps(good(40), indent=1))
        case "folder":
            path = tmp_path / "folder"
            path.mkdir()
            table.to_parquet(path / "train.parquet")
        case "saved":
            path = tmp_path / "saved"
            datasets.DatasetDict({"train": table}).save_to_disk(path)
    source = HfSource(HfSource.Config(path=str(path), heldout_share=0.25), seed=0)
    assert source.check() == []
    train, bad = source.load("train")
    assert (len(train), len(source.load("heldout")[0]), bad) == (30, 10, [])
    assert train[0].answer == str(int(train[0].origin.rpartition(":")[2]))
    typo = HfSource(HfSource.Config(path=str(path), prompt_column="qestion"), seed=0)
    assert "Did you mean 'question'?" in typo.check()[0]


def test_hf_errors_name_the_place(tmp_path: Path) -> None:
    absent = HfSource(HfSource.Config(path=str(tmp_path / "absent.parquet")), seed=0)
    assert "no such file" in absent.check()[0]
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    assert "is not a Parquet file" in HfSource(HfSource.Config(path=str(tmp_path / "broken.parquet")), 0).check()[0]
    write(tmp_path / "d.jsonl", good(3))
    with pytest.raises(ValidationError, match="has no splits"):
        HfSource.Config(path=str(tmp_path / "d.jsonl"), split="tset")
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(good(3))}).save_to_disk(tmp_path / "saved")
    absent = HfSource(HfSource.Config(path=str(tmp_path / "saved"), heldout_split="validation"), 0)
    assert absent.check() == [f"data.path={tmp_path / 'saved'} has no split 'validation'; it has train."]


def test_hub_without_a_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    [message] = HfSource(HfSource.Config(path="openai/gsm8k", subset="main"), 0).check()
    assert "127.0.0.1 cannot be reached" in message
    assert "hf download openai/gsm8k --repo-type dataset" in message


GZIPPED = b"\x1f\x8b\x08\x00 and so on"
NOT_READ_GZIPPED = ("json.gz", "csv.gz", "parquet.gz", "csv", "jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty"),
        ("d.jsonl", '{"question": "1"}'.encode("utf-16"), "is UTF-16; write it as UTF-8"),
        *(
            (f"d.{end}", GZIPPED, "is gzipped, but only .jsonl.gz can be read gzipped: unpack it")
            for end in NOT_READ_GZIPPED
        ),
        ("d.jsonl", b"question,answer\n1+1?,2\n", "A CSV file's name must end in .csv"),
        ("d.jsonl", b"\xff\x00garbage\n", "not UTF-8"),
        ("d.jsonl", b"\n\n", "it has only blank lines"),
        ("d.json", b'[{"question": "1+1?"', "broken JSON"),
        ("d.csv", b"question;answer\n", "has no rows"),
        (
            "d.csv",
            b"question,answer\nWhat is 1, 2 and 3?,6\n",
            "no rows that can be read; the first: d.csv:2: 3 fields",
        ),
        ("d.csv", "question,answer\nWieviel für 2?,4\n".encode("latin-1"), "is not UTF-8"),
        ("d.parquet", b"PAR1 but cut", "is not a Parquet file that can be read"),
    ],
)
def test_each_cause_has_its_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    [problem] = jsonl(tmp_path / name).check()
    assert message in problem
    assert str(tmp_path / name) in problem


def test_parquet_by_any_name(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(good(40)).to_parquet(tmp_path / "d.jsonl")
    source = jsonl(tmp_path / "d.jsonl")
    assert source.check() == []
    assert len(source.load("train")[0]) == 38


def test_csv_separators_quotes_and_text_that_looks_like_a_number(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text('\ufeffquestion;answer;words\n"Two\nlines; one cell";007;3\nCode?;0x1F;4\n', encoding="utf-8")
    source = jsonl(file, heldout_path=str(write(tmp_path / "h.jsonl", good(2))))
    assert source.check() == []
    train, bad = source.load("train")
    assert bad == []
    assert [(p.messages[0].content, p.answer, p.columns["words"]) for p in train] == [
        ("Two\nlines; one cell", "007", 3),
        ("Code?", "0x1F", 4),
    ]
    file.write_text("question,answer\na,1\nb,2,3\nc,4\n")
    [problem] = jsonl(file).check()
    assert "1 of 3 rows cannot be used" in problem
    assert "3 fields, where the header has 2" in problem


def test_several_files_and_patterns(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", good(10)[:5])
    write(tmp_path / "a.jsonl", good(10)[5:])
    pattern = jsonl(tmp_path / "*.jsonl")
    assert pattern.check() == []
    origins = [p.origin for p in pattern.load("train")[0] + pattern.load("heldout")[0]]
    assert len(origins) == 10
    assert sorted(origins)[0] == "a.jsonl:1"
    listed = FileSource(FileSource.Config(path=(str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl"))), 0)
    assert len(listed.load("train")[0]) == len(pattern.load("train")[0])
    assert "no file matches" in jsonl(tmp_path / "x*.jsonl").check()[0]


def test_columns_inside_columns(tmp_path: Path) -> None:
    """verl's layout."""
    import datasets

    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        }
        for i in range(20)
    ]
    file = tmp_path / "verl.parquet"
    datasets.Dataset.from_list(rows).to_parquet(file)
    nested = jsonl(file, prompt_column="prompt", answer_column="reward_model.ground_truth")
    assert nested.check() == []
    assert nested.load("train")[0][0].answer in {str(i + 1) for i in range(20)}
    [outer] = jsonl(file, prompt_column="prompt", answer_column="reward_model").check()
    assert "reward_model.ground_truth" in outer
    [typo] = jsonl(file, prompt_column="prompt", answer_column="reward_model.groundtruth").check()
    assert "in reward_model: no column 'groundtruth' (did you mean 'ground_truth'?)" in typo
