"""`rlkit.evaluate` from its arguments: what is refused before anything starts, and recorded answers to the end, for
which a light installation is enough."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from judge_fixture import Asked, JudgeServer, Reply
from paths import ROOT

from rlkit import cli
from rlkit.assessment.chat import policy_folder
from rlkit.assessment.config import load_evaluation
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import config_text
from rlkit.evaluate import main

ANSWERS = [
    {"prompt": "What is 1 + 2?", "responses": ["#### 3", "#### 4", "3 #### 3", "no"], "answer": "3"},
    {"prompt": "What is 2 + 2?", "responses": ["#### 4", "#### 4", "#### 5", "#### 5"], "answer": "4"},
    {"prompt": "What is 3 + 2?", "responses": ["#### 5", "#### 5", "#### 5", "#### 5"], "answer": "5"},
]
LABELS = [[True, False, True, False], [True, True, False, False], [True, True, True, True]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "responses.jsonl"
    rows = [{**row, "labels": labels} for row, labels in zip(ANSWERS, LABELS, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def problems(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_evaluation(arguments)
    return str(raised.value)


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_recorded_answers_are_judged_by_the_data_or_by_a_reward(data: Path, tmp_path: Path) -> None:
    words = ["data=responses", f"data.path={data}"]
    assert main([*words, f"run_dir={tmp_path / 'labels'}"]) == 0
    labels = result(tmp_path / "labels")
    assert labels["lines"][0]["mean"]["value"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert labels["lines"][0]["of_k"]["pass@"]["2"]["value"] == pytest.approx((5 / 6 + 5 / 6 + 1) / 3)
    assert (labels["judge"], labels["data"]["questions"], labels["schema"]) == ("the data's labels", 3, 1)


def test_a_reward_judges_recorded_answers_without_torch_vllm_or_ray(data: Path, tmp_path: Path) -> None:
    """As in an installation that has none of them."""
    folder = tmp_path / "rule"
    script = (
        "import sys\n"
        "for name in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"
        "from rlkit.evaluate import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["policy=none", "data=responses", f"data.path={data}", "data.answer_column=answer", "reward=rule"]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments, f"run_dir={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (line,) = result(folder)["lines"]
    assert line["mean"]["value"] == pytest.approx(2 / 3)
    assert line["of_k"]["maj@"]["4"]["value"] == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    rows = [json.loads(row) for row in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["kind"] for row in rows} == {"evaluation"}
    assert [row["correct"] for row in rows[:4]] == [1.0, 0.0, 1.0, 0.0]
    assert rows[0]["group_rewards"] == [1.0, 0.0, 1.0, 0.0]
    (metrics,) = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics["kind"] == "evaluation" and metrics["accuracy/heldout/low"] < metrics["accuracy/heldout"]
    assert "66.7 %" in run.stdout and "majority" in run.stdout


def test_an_evaluation_goes_on_where_it_ended(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["data=responses", f"data.path={data}", f"run_dir={folder}"]
    assert main(words) == 0
    file, before = folder / "samples.jsonl", result(folder)["lines"]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:8]) + lines[8][:40])  # killed while it wrote the third group
    (folder / "results.json").unlink()
    assert main(words) == 2, "a folder with answers is not taken without being asked"
    assert main([*words, "evaluate.samples=3", "resume=auto"]) == 2, "nor by another evaluation"
    assert main([*words, "resume=auto"]) == 0
    assert result(folder)["lines"] == before
    assert sorted(file.read_text().splitlines()) == sorted(line.rstrip("\n") for line in lines)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_it_is_compared_with_another_evaluation(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=responses", f"data.path={data}"]
    assert main([*words, f"run_dir={tmp_path / 'one'}"]) == 0
    assert main([*words, f"run_dir={tmp_path / 'two'}", f"evaluate.against={tmp_path / 'one'}"]) == 0
    (comparison,) = result(tmp_path / "two")["comparisons"]
    assert (comparison["difference"]["value"], comparison["winner"]) == (0.0, None)
    assert capsys.readouterr().out.rstrip().splitlines()[-3].endswith("none")


def test_a_question_that_has_changed_is_not_compared(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row's place is its id; the text tells whether it asks the same."""
    rows = data.read_text().splitlines(keepends=True)
    again = f"evaluate.against={tmp_path / 'before'}"
    assert main(["data=responses", f"data.path={data}", f"run_dir={tmp_path / 'before'}"]) == 0
    for name, lines, compared in [
        ("changed", [rows[0], rows[1].replace("What is", "Say what is"), rows[2]], [2]),
        ("moved", [rows[2], *rows[:2]], []),
    ]:
        data.write_text("".join(lines))
        assert main(["data=responses", f"data.path={data}", f"run_dir={tmp_path / name}", again]) == 0
        assert [own["difference"]["questions"] for own in result(tmp_path / name)["comparisons"]] == compared
        said = f"{3 - sum(compared)} questions of {tmp_path / 'before'} ask something else here and are not compared."
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.total_steps=3"], "trainer.total_steps=3: has no effect here"),
        (["checkpoints=all"], "has no effect without run=FOLDER"),
        (["evaluate.samples=0"], "nothing is answered; add evaluate.greedy=true"),
        (["run=nowhere"], "is not the folder of a run"),
        (["model=endpoint"], "needs the server's address: model.url=http://127.0.0.1:8000/v1"),
        (["model=endpoint", "model.url=ftp://x"], "must be http://HOST:PORT/v1"),
        (["model=endpoint", "model.url=http://a:b@x/v1"], "a secret belongs in the environment variable"),
        (
            ["model=endpoint", "model.url=http://far.example/v1", "model.token_env=HOME"],
            "its token would go to far.example unencrypted",
        ),
        (
            ["model=endpoint", "model.url=http://127.0.0.1:1/v1", "rollout.workers=2"],
            "has no effect: the server samples",
        ),
        (
            ["model=endpoint", "model.url=http://127.0.0.1:1/v1", "reward=group_length", "evaluate.samples=2"],
            "reads tokens, but an endpoint returns only texts",
        ),
        (
            ["model.url=http://127.0.0.1:1/v1", "model=tiny", "model.name=x", "model.path=/x"],
            "the server has the model",
        ),
        (["policy=none"], "nothing judges the answers"),
        (["reward=implicit_prm"], "learns in a run"),
        (["reward=environment"], "there is none"),
        (["evaluate.against=nowhere"], "there is no nowhere/samples.jsonl"),
        (["evaluate.sample=3"], "did you mean evaluate.samples?"),
        (["reward=group_length", "evaluate.samples=1"], "compares 2 answers"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(arguments: list[str], said: str) -> None:
    assert said in problems(*arguments)


def test_who_judges() -> None:
    rule = load_evaluation(["data=arithmetic"])
    assert rule.judge is not None and (rule.judge.cls.__name__, rule.chooser) == ("MathReward", None)
    polar = load_evaluation(["data=arithmetic", "reward=polar"])
    assert polar.judge is not None and (polar.judge.cls.__name__, polar.chooser) == ("PolarReward", None)
    both = load_evaluation(["data=arithmetic", "reward=polar", "verifier=rule", "evaluate.samples=2"])
    assert both.judge is not None and both.chooser is not None
    assert (both.judge.cls.__name__, both.chooser.cls.__name__) == ("MathReward", "PolarReward")
    episodes = load_evaluation(["environment=maze", "data=environment", "model=agent"])
    assert episodes.judge is not None and episodes.judge.cls.__name__ == "EnvironmentReward"
    nobody = load_evaluation(["data=arithmetic"], judged=False)
    assert nobody.judge is None and nobody.chooser is None
    with pytest.raises(ConfigError, match=r"has no effect in rlkit\.generate"):
        load_evaluation(["data=arithmetic", "reward=rule"], judged=False)


def test_a_run_brings_its_data_model_and_verifier(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = load_config(["verifier=gsm8k", "reward=rule", "evaluation.temperature=0.5", f"run_dir={run}"]).config
    for step in (2, 4):
        (run / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        (run / f"checkpoints/step_{step:06d}/policy").symlink_to(ROOT / "rlkit/embedded/policy")
    (run / "config.yaml").write_text(config_text(config))
    everything = load_evaluation([f"run={run}", "checkpoints=all"])
    assert [policy.step for policy in everything.policies] == [0, 2, 4]
    assert (everything.judge is not None and everything.judge.cls.__name__ == "GSM8KReward") or everything.judge
    assert everything.config.rollout.temperature == 0.5
    assert everything.chooser is None, "the reward it trained by is not asked unless it is named"
    (last,) = load_evaluation([f"run={run}"]).policies
    assert (last.step, Path(last.path).name) == (4, "policy")
    chosen = load_evaluation([f"run={run}", "checkpoints=[2]", "reward=polar", "evaluate.samples=2"])
    assert chosen.chooser is not None and [policy.step for policy in chosen.policies] == [2]
    assert "it has 2, 4" in problems(f"run={run}", "checkpoints=[3]")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run of two checkpoints, whose evaluation asks a further set."""
    (tmp_path / "hard.jsonl").write_text('{"question": "What is 11 + 12?", "answer": "#### 23"}\n' * 3)
    run, hard = (
        tmp_path / "run",
        ["evaluation.sets.hard.data=jsonl", f"evaluation.sets.hard.path={tmp_path}/hard.jsonl"],
    )
    config = load_config(["verifier=gsm8k", "reward=rule", *hard, f"run_dir={run}"]).config
    for step in (2, 4):
        (run / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        (run / f"checkpoints/step_{step:06d}/policy").symlink_to(ROOT / "rlkit/embedded/policy")
    (run / "config.yaml").write_text(config_text(config))
    (run / "samples.jsonl").touch()
    return run


def test_a_run_a_checkpoint_or_a_model_is_the_first_word(trained: Path) -> None:
    newest, second = trained / "checkpoints/step_000004", trained / "checkpoints/step_000002"
    for words, step, policy in [
        ([str(trained)], 4, newest),
        ([f"run={trained}"], 4, newest),
        ([str(second)], 2, second),
        ([f"run={second}"], 2, second),
        ([str(second / "policy"), "data=arithmetic"], 2, second),
    ]:
        found = load_evaluation(words)
        assert [(one.step, Path(one.path)) for one in found.policies] == [(step, policy / "policy")]
        assert found.config.run == trained
        assert policy_folder(words[0].removeprefix("run=")) == policy / "policy"
    assert load_evaluation(["embedded:policy"]).policies[0].path == "embedded:policy"
    folder = str(ROOT / "rlkit/embedded/policy")
    assert (load_evaluation([folder]).policies[0].path, load_evaluation([folder]).config.run) == (folder, None)
    assert [policy.step for policy in load_evaluation([str(trained), "checkpoints=all"]).policies] == [0, 2, 4]
    for words, said in [
        ([str(second), "checkpoints=all"], "says that already; leave one of them out"),
        ([str(trained), f"run={trained}"], "is already given; leave one of them out"),
        ([f"{trained}s"], f"did you mean {trained}?"),
        ([str(trained / "checkpoints")], "name a run (runs/x), a checkpoint"),
        (["embedded:policy", "model.path=x"], "embedded:policy says that already"),
    ]:
        assert said in problems(*words), words


@pytest.mark.parametrize("command", ["evaluate", "generate", "rescore", "chat", "export", "sync", "report", "view"])
def test_every_command_takes_a_run_as_a_word_and_as_run(
    command: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stops behind the reading of its words: nothing is asked of the model, sent or served."""
    more = {
        "evaluate": ["dry_run=true"],
        "generate": ["dry_run=true"],
        "rescore": ["reward=rule", "dry_run=true"],
        "chat": ["tempreature=1"],
        "export": ["inspec"],
        "sync": [],
        "report": ["--max-mb", "x"],
        "view": ["--port", "x"],
    }[command]
    said = []
    for word in (str(trained), f"run={trained}"):
        words = [*more, word] if command == "export" else [word, *more]
        with contextlib.suppress(SystemExit):  # argparse's
            cli.main([command, *words])
        printed = capsys.readouterr()
        said.append(re.sub(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", "NOW", printed.out + printed.err).replace("run=/", "/"))
    assert said[0] == said[1]
    assert "is no" not in said[0] and "names no" not in said[0]


def test_the_folder_of_an_evaluation_says_what_is_evaluated(trained: Path, data: Path) -> None:
    for words, name in [
        ([str(trained)], "evaluate_run_4_heldout"),
        ([str(trained), "checkpoints=all"], "evaluate_run_all_heldout"),
        ([str(trained), "checkpoints=[2,4]", "data=arithmetic"], "evaluate_run_2_4_arithmetic"),
        ([str(trained), "checkpoints=2"], "evaluate_run_2_heldout"),
        (["embedded:policy"], "evaluate_policy_arithmetic"),
        (["data=arithmetic", "reward=polar"], "evaluate_policy_arithmetic"),
        (["data=responses", f"data.path={data}"], "evaluate_recorded_responses"),
        (["model=endpoint", "model.url=http://127.0.0.1:1/v1"], "evaluate_endpoint_arithmetic"),
    ]:
        folder = load_evaluation(words).config.run_dir
        assert re.fullmatch(rf"[-\d]+_[-\d]+_{name}", folder.name), folder
        assert folder.parent.name == "runs"
    assert load_evaluation([str(trained)], judged=False).config.run_dir.name.endswith("generate_run_4_heldout")
    assert load_evaluation([str(trained), "run_dir=x"]).config.run_dir.name == "x"


def test_a_run_that_answered_greedily_is_asked_so(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(written.replace("  greedy: false", "  greedy: true"))
    for words, asked in [
        ([], "1 greedy"),
        (["evaluate.questions=8"], "1 greedy"),
        (["evaluate.samples=4"], "4 sampled"),
        (["evaluate.greedy=false"], "1 sampled"),
        (["rollout.temperature=0.6"], "1 sampled"),
    ]:
        assert cli.main(["evaluate", str(trained), *words, "dry_run=true"]) == 0
        assert f"to each question: {asked}\n" in capsys.readouterr().out


def test_a_run_is_asked_what_it_held_out_and_other_data_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data are named by an option, or by their path alone."""
    for name, count in (("train", 40), ("test", 8)):
        rows = [{"question": f"{name}: {i} + 1?", "answer": f"#### {i + 1}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, test = tmp_path / "run", f"data.path={tmp_path}/test.jsonl"
    train = ["data=jsonl", f"data.path={tmp_path}/train.jsonl", "verifier=gsm8k", "reward=rule"]
    hard = [f"evaluation.sets.hard.path={tmp_path}/test.jsonl", "evaluation.sets.hard.prompts=1"]
    written = config_text(load_config([*train, *hard, f"run_dir={run}"]).config)
    (run / "checkpoints/step_000002").mkdir(parents=True)
    (run / "checkpoints/step_000002/policy").symlink_to(ROOT / "rlkit/embedded/policy")
    (run / "config.yaml").write_text(written)
    for number, (words, asked, what, data) in enumerate(
        [
            ([], 2 + 1, "held-out questions", "heldout"),
            (["data.heldout_share=0.1"], 4 + 1, "held-out questions", "heldout"),
            (["data=jsonl", test], 8, "questions", "test"),
            ([test], 8, "questions", "test"),
        ]
    ):
        assert cli.main(["evaluate", str(run), *words, "dry_run=true"]) == 0
        said = capsys.readouterr().out
        assert (
            f"asked: all {asked - (number < 2)} {what} of FileSource\n" in said and f"evaluate_run_2_{data}\n" in said
        )
        if number in (1, 2):
            continue
        one, again = tmp_path / f"one_{number}", tmp_path / f"again_{number}"
        with JudgeServer(lambda asked: Reply("#### 1")) as server:
            served = [f"model.url={server.url}", "model.name=ones"]
            assert main([str(run), *words, *served, f"run_dir={one}"]) == 0
            assert main(["--config", f"{one}/config.yaml", f"run_dir={again}"]) == 0
            assert len(server.asked) == 2 * asked
        assert result(one)["data"] == result(again)["data"]


def test_the_sets_of_a_run_are_asked_too(trained: Path, data: Path, tmp_path: Path) -> None:
    found = load_evaluation([str(trained)])
    assert [(name, one.config.path, one.prompts) for name, one in found.sets.items()] == [
        ("hard", f"{tmp_path}/hard.jsonl", None)
    ]
    fewer = load_evaluation([str(trained), "evaluation.sets.hard.prompts=2", "evaluation.sets.more.max_operand=9"])
    assert {name: one.prompts for name, one in fewer.sets.items()} == {"hard": 2, "more": None}
    assert load_evaluation([str(trained), "data=arithmetic"]).sets == {}, "other questions take their place"
    assert set(load_evaluation(["data=arithmetic", "evaluation.sets.more.max_operand=9"]).sets) == {"more"}
    (tmp_path / "again.yaml").write_text(found.text())
    assert load_evaluation([], tmp_path / "again.yaml").sets == found.sets
    assert "evaluation.samples=2: has no effect here" in problems(str(trained), "evaluation.samples=2")
    assert "no such file" in problems("evaluation.sets.more.data=jsonl", "evaluation.sets.more.path=gone.jsonl")
    recorded = ["data=responses", f"data.path={data}", "evaluation.sets.more.path=gone.jsonl"]
    assert "the answers are recorded" in problems(*recorded)


@pytest.mark.slow
def test_each_set_has_numbers_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked of a server that adds, and cannot add above 10."""

    def added(asked: Asked) -> Reply:
        total = sum(map(int, re.findall(r"\d+", asked.body["messages"][-1]["content"])))
        return Reply(f"#### {min(10, total)}")

    for name, first in (("easy", 1), ("hard", 4)):
        sums = [(n, n + 1) for n in range(first, first + 4)]
        rows = [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in sums]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    words = [
        "data=jsonl",
        f"data.path={tmp_path}/easy.jsonl",
        "reward=rule",
        f"evaluation.sets.hard.path={tmp_path}/hard.jsonl",
    ]
    words += ["evaluation.sets.hard.prompts=3", "evaluate.samples=2", "evaluate.greedy=true", f"run_dir={folder}"]
    with JudgeServer(added) as server:
        words += ["model=endpoint", f"model.url={server.url}", "model.name=sums"]
        assert main(words) == 0
        assert len(server.asked) == 3 * 4 + 3 * 3
        kept = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
        (folder / "samples.jsonl").write_text(
            "".join(line for line in kept if '"set":"hard"' not in line.replace(" ", ""))
        )
        before = result(folder)
        assert main([*words, "resume=auto"]) == 0
        assert len(server.asked) == 3 * 4 + 2 * 3 * 3, "only what is missing is asked again"
    found = result(folder)
    hard = found["sets"]["hard"]
    assert (found["data"]["questions"], hard["data"]["questions"]) == (4, 3)
    assert found["data"]["sha256"] != hard["data"]["sha256"]
    assert [line["mean"]["value"] for line in found["lines"]] == [1.0, 1.0]
    assert [(line["decoding"], line["answers"], line["mean"]["value"]) for line in hard["lines"]] == [
        ("sampled", 6, pytest.approx(1 / 3)),
        ("greedy", 3, pytest.approx(1 / 3)),
    ]
    assert (before["lines"], before["sets"]) == (found["lines"], found["sets"])
    (metrics,) = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics["accuracy/heldout"] == 1.0 and metrics["evaluation/greedy/accuracy"] == 1.0
    assert metrics["evaluation/hard/accuracy"] == metrics["evaluation/hard/greedy/accuracy"] == pytest.approx(1 / 3)
    assert metrics["evaluation/hard/pass@2"] == pytest.approx(1 / 3)
    printed = capsys.readouterr().out
    assert "\nJudged by MathReward" in printed and "\nhard: Judged by MathReward" in printed


def test_a_dry_run_says_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embedded:policy", "data=arithmetic", "evaluate.samples=8", f"run_dir={tmp_path / 'run'}", "dry_run=true"]
    for questions, asked in (("16", "16 of 1024"), ("null", "all 1024")):
        assert cli.main(["evaluate", *words, f"evaluate.questions={questions}"]) == 0
        said = capsys.readouterr().out
        assert f"asked: {asked} held-out questions of Arithmetic\nto each question: 8 sampled\n" in said


def test_a_dry_run_is_not_proposed_after_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hint = "`dry_run=true` checks without running"
    for command, words, proposed in [
        ("evaluate", ["evaluate.sample=3"], True),
        ("evaluate", ["evaluate.sample=3", "dry_run=true"], False),
        ("train", ["trainer.total_stepz=3"], True),
        ("train", ["trainer.total_stepz=3", "dry_run=true"], False),
        ("sync", [], False),
    ]:
        assert cli.main([command, *words]) == 2
        said = capsys.readouterr().err
        assert "Nothing was started. `--help` lists every key" in said and (hint in said) is proposed, (command, words)
