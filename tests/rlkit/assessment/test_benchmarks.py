"""Reward benchmarks from files of their authors' form: what is read as right and wrong, and the command to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlkit.assessment.config import load_evaluation
from rlkit.config.messages import ConfigError
from rlkit.evaluate import main

CHAT = [{"role": "user", "content": "Hi"}]
ROWS: dict[str, dict[str, Any]] = {
    "reward_bench": {"prompt": "Hi", "chosen": "good", "rejected": "bad", "subset": "hep-go", "chosen_model": "m"},
    "reward_bench_2": {"id": "7", "prompt": "Hi", "chosen": ["good"], "rejected": ["bad", "worse"], "subset": "Math"},
    "rm_bench": {"prompt": "Hi", "chosen": ["g", "go", "good"], "rejected": ["b", "ba", "bad"], "domain": "chat"},
    "judge_bench": {
        "pair_id": "x", "question": "Hi", "response_A": "bad", "response_B": "good", "label": "B>A",
        "source": "mmlu-pro-law",
    },
    "ppe": {
        "prompt": "Hi", "response_1": "bad", "response_2": "good", "response_10": "worse",
        "scores": [False, True, False], "benchmark": "gpqa",
    },
}  # fmt: skip


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "benchmark.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", ROWS)
def test_what_is_read_as_right_and_wrong(name: str, tmp_path: Path) -> None:
    words = [f"data={name}", f"data.path={written(tmp_path, ROWS[name])}", "reward=length", "reward.min_tokens=5"]
    (problem,), bad = load_evaluation(words).source().load_set()
    said = {response.messages[0].content: response.value for response in problem.responses}
    assert not bad and [m.content for m in problem.messages] == ["Hi"]
    assert said["good"] == 1 and said["bad"] == 0
    assert said.get("worse", 0) == 0 and len(said) == {"rm_bench": 6, "reward_bench_2": 3, "ppe": 3}.get(name, 2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rm_bench", {"chosen": ["g"]}, "three responses each"),
        ("judge_bench", {"label": "A=B"}, "not A>B or B>A"),
        ("ppe", {"scores": [True]}, "3 columns response_N, but 1 scores"),
    ],
)
def test_rows_of_another_form_are_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path, ROWS[name] | change)
    with pytest.raises(Exception, match=message):
        load_evaluation(
            [f"data={name}", f"data.path={file}", "reward=length", "reward.min_tokens=5"]
        ).source().load_set()


def test_a_file_of_another_benchmark_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = written(tmp_path, ROWS["judge_bench"])
    with pytest.raises(ConfigError, match=r"no column 'domain' \(it has pair_id"):
        load_evaluation(["data=rm_bench", f"data.path={file}", "reward=length", "reward.min_tokens=5"])


def test_the_command_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward for length, and lengths that say what it will like."""
    questions = [
        ("Focus", "1", ["one two three four five six"], ["a", "b", "c"]),
        ("Math", "2", ["a"], ["one two three four five six", "b", "c"]),
        ("Ties", "ref:1", ["red red red red"], ["blue"]),
        ("Ties", "tied:1", ["red it is", "red it is"], ["dog"]),
    ]
    rows = [
        {"id": name, "prompt": f"Question {name}", "subset": subset, "chosen": right, "rejected": wrong}
        for subset, name, right, wrong in questions
    ]
    words = ["data=reward_bench_2", f"data.path={written(tmp_path, *rows)}", f"run_dir={tmp_path / 'run'}"]
    assert main([*words, "reward=length", "reward.min_tokens=40", "reward.slope_tokens=40"]) == 0
    standing = json.loads((tmp_path / "run/results.json").read_text())["benchmark"]
    assert (standing["title"], standing["questions"], standing["left_out"]) == ("RewardBench 2", 4, 0)
    assert standing["values"] == {
        "Focus": 1.0, "Math": 0.0, "Ties": pytest.approx(1.01), "total": pytest.approx((1 + 0 + 1.01) / 3)
    }  # fmt: skip
    assert "RewardBench 2, 4 questions" in capsys.readouterr().out


def test_a_group_that_is_judged_again_counts_once(tmp_path: Path) -> None:
    """Killed while it wrote the six answers to a question, of which a comparison by style needs each once."""
    folder, file = tmp_path / "run", written(tmp_path, ROWS["rm_bench"])
    words = ["data=rm_bench", f"data.path={file}", "reward=length", "reward.min_tokens=5", f"run_dir={folder}"]
    assert main(words) == 0
    whole = json.loads((folder / "results.json").read_text())
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    for kept in (lines[:4], lines[:2] * 3):  # of two answers there are six rows, too
        (folder / "samples.jsonl").write_text("".join(kept))
        assert main([*words, "resume=auto"]) == 0
        again = json.loads((folder / "results.json").read_text())
        assert (again["lines"], again["benchmark"]) == (whole["lines"], whole["benchmark"])
        assert json.loads((folder / "summary.json").read_text())["answers"] == 6
