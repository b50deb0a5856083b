"""`rlkit.rescore` from its arguments to the file and both rewards side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_fixture import JudgeServer, Reply

from rlkit.assessment.rescoring import load_rescoring
from rlkit.config.command import exit_code
from rlkit.config.messages import ConfigError
from rlkit.evaluate import main
from rlkit.rescore import main as rescore


def a_run(folder: Path) -> Path:
    """Rows as training leaves them: two groups of two answers."""
    folder.mkdir()
    rows = [
        {
            "step": 1,
            "group_id": f"0000000{g}",
            "prompt_id": f"p{g}",
            "prompt": [{"role": "user", "content": "What is 1 + 2?"}],
            "answer": "3",
            "references": [],
            "sample": i,
            "response": text,
            "reward": reward,
            "finish_reason": "stop",
        }
        for g, answers in enumerate([[("#### 3", 0.0), ("#### 4", 1.0)], [("#### 3", 2.0), ("so 3", None)]])
        for i, (text, reward) in enumerate(answers)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    return folder


def test_answers_of_a_run_under_another_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    assert rescore([str(run), "reward=rule"]) == 0
    head, *rows = [json.loads(line) for line in (run / "rescored/rule.jsonl").read_text().splitlines()]
    assert (head["kind"], head["name"], head["reward"]["_target_"]) == (
        "rescored",
        "rule",
        "rewards.verifiers.math.MathReward",
    )
    assert [(row["group_id"], row["sample"], row["reward"]) for row in rows] == [
        ("00000000", 0, 1.0),
        ("00000000", 1, 0.0),
        ("00000001", 0, 1.0),
        ("00000001", 1, 0.0),
    ]
    said = capsys.readouterr().out
    assert "4 answers, 3 judged by both" in said
    assert "1.000 recorded" in said and "0.667 rule" in said
    said = said.split("Ranked higher by rule, of 3 answers; equal rewards share a rank:\n")[1]
    up, down = said.split("Ranked lower by rule, of 3 answers; equal rewards share a rank:\n")
    assert up.splitlines()[0].split() == ["recorded", "rank", "rule", "rank", "answer"]
    assert up.splitlines()[1].split() == ["0.000", "3", "1.000", "1.5", "step", "1", "00000000", "sample", "0"]
    assert down.splitlines()[1].split()[:4] == ["1.000", "2", "0.000", "3"]
    assert rescore([str(run), "reward=rule", "reward.strip_units=true"]) == 2
    assert "rule.jsonl: already exists, from another reward" in capsys.readouterr().err
    assert rescore([str(run), "reward=rule", "name=again"]) == 0


def test_the_same_command_goes_on_where_it_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one judge was paid for is not asked again."""
    run = a_run(tmp_path / "run")
    assert rescore([str(run), "reward=rule"]) == 0
    said, file = capsys.readouterr().out, run / "rescored/rule.jsonl"
    head, *rows = file.read_text().splitlines(keepends=True)
    kept = [row.replace('"reason":""', '"reason":"the first time"') for row in rows]
    assert kept[0] != rows[0]
    file.write_text("".join([head, *kept[:3], kept[3][:20]]))
    assert rescore([str(run), "reward=rule"]) == 0
    assert capsys.readouterr().out == said
    assert file.read_text() == "".join([head, *kept[:3], *rows[2:]]), "the group that is half there is judged whole"
    assert rescore([str(run), "reward=rule"]) == 0, "and shown once more"
    assert capsys.readouterr().out == said
    assert file.read_text() == "".join([head, *kept[:3], *rows[2:]])


@pytest.mark.slow
def test_answers_to_sets_are_rescored_with_the_columns_of_their_own_data(tmp_path: Path) -> None:
    """Rows of both files have the same ids."""
    for name, right, options in (("own", "A", ["red", "blue"]), ("hard", "B", ["blue", "red"])):
        (tmp_path / name).mkdir()
        rows = [{"question": f"Which {what}?", "answer": right, "options": options} for what in ("one", "other")]
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    words = ["data=jsonl", f"data.path={tmp_path}/own/rows.jsonl", "reward=rule", f"run_dir={run}"]
    with JudgeServer(lambda asked: Reply("Answer: red")) as server:
        words += [f"evaluation.sets.hard.path={tmp_path}/hard/rows.jsonl", "model=endpoint", f"model.url={server.url}"]
        assert main([*words, "model.name=one"]) == 0
    assert rescore([str(run), "reward=multiple_choice", "reward.options_column=options"]) == 0
    _, *rows = [json.loads(line) for line in (run / "rescored/multiple_choice.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [1.0] * 4


def test_what_cannot_be_rescored(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    for words, said in [
        ([], "choose the other reward"),
        (["reward=environment"], "judges episodes as they were played"),
        (["reward=implicit_prm"], "learns in a run"),
        (["reward=rule", "trainer.seed=1"], "has no effect here"),
    ]:
        with pytest.raises(ConfigError) as raised:
            load_rescoring(str(run), words)
        assert said in str(raised.value)
    assert exit_code(lambda words: 0 if load_rescoring(str(tmp_path), words) else 1, ["reward=rule"]) == 2
