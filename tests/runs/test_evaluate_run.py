"""`rlkit.evaluate`, `generate`, `chat` and `rescore` to the end: a run's checkpoints, an environment, a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from own_venv import own_python
from paths import ROOT
from run_fixture import Run

from rlkit.cluster.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SMALL = ("cluster.object_store_gib=0.1", "cluster.threads_per_actor=1", "rollout.memory_gib=0.1")


def command(module: str, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def rows(folder: Path, name: str = "samples") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two steps, both saved."""
    run = Run(
        tmp_path_factory.mktemp("trained"),
        "trainer.total_steps=2",
        "trainer.save_every_steps=1",
        "trainer.evaluate_every_steps=0",
        "learner.learning_rate=1e-3",
    )
    try:
        assert run.end() == 0, run.text
        yield run
    finally:
        run.clean_up()


def test_a_curve_over_checkpoints(trained: Run, tmp_path: Path) -> None:
    words = [f"run={trained.folder}", "checkpoints=all", "evaluate.samples=2", "evaluate.greedy=true", *SMALL]
    done = command("rlkit.evaluate", *words, "evaluate.questions=12", f"run_dir={tmp_path / 'all'}")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "all")
    lines = [(line["step"], line["decoding"], line["answers"]) for line in found["lines"]]
    assert lines == [(step, how, n) for step in (0, 1, 2) for how, n in (("sampled", 24), ("greedy", 12))]
    assert len(found["comparisons"]) == 4 and all(len(one["difference"]) == 4 for one in found["comparisons"])
    answers = rows(tmp_path / "all")
    assert len(answers) == 3 * 36 and all(row["length"] > 0 and row["token_ids"] for row in answers)
    greedy = {(row["step"], row["prompt_id"]): row["response"] for row in answers if row["decoding"] == "greedy"}
    assert any(greedy[0, question] != greedy[2, question] for _, question in greedy), "the checkpoints are one model"
    curve = [(row["kind"], row["step"]) for row in rows(tmp_path / "all", "metrics")]
    assert curve == [("evaluation", 0), ("evaluation", 1), ("evaluation", 2)]

    # The same seeds give the same answers, and those that are there are not sampled again.
    kept = (tmp_path / "all/samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "all/samples.jsonl").write_text("".join(kept[: 3 * 36 - 3]))
    again = command("rlkit.evaluate", *words, "evaluate.questions=12", f"run_dir={tmp_path / 'all'}", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "loading embedded:policy" not in again.stdout, "step 0 was whole"
    assert result(tmp_path / "all")["lines"] == found["lines"]


def test_a_further_set_of_a_checkpoint(trained: Run, tmp_path: Path) -> None:
    checkpoint = f"{trained.folder}/checkpoints/step_000002"
    words = [checkpoint, "evaluation.sets.small.max_operand=9", "evaluation.sets.small.prompts=4", *SMALL]
    done = command("rlkit.evaluate", *words, "evaluate.questions=6", f"run_dir={tmp_path / 'sets'}")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "sets")
    asked = [(line["step"], line["answers"]) for part in (found, found["sets"]["small"]) for line in part["lines"]]
    assert asked == [(2, 6), (2, 4)]
    assert sorted({row.get("set", "") for row in rows(tmp_path / "sets")}) == ["", "small"]


def test_a_reward_chooses_the_best_of_an_untrained_model_s_answers(tmp_path: Path) -> None:
    words = ["data=arithmetic", "verifier=rule", "reward=polar", "evaluate.samples=4", "evaluate.questions=16", *SMALL]
    done = command("rlkit.evaluate", *words, f"run_dir={tmp_path / 'best'}", "--markdown")
    assert done.returncode == 0, done.stderr
    (line,) = result(tmp_path / "best")["lines"]
    chosen, oracle = (line["of_k"][name]["4"]["value"] for name in ("chosen@", "pass@"))
    assert line["mean"]["value"] < chosen <= oracle
    assert "| step 0 sampled: best by PolarReward |" in done.stdout


def test_episodes_of_an_environment(tmp_path: Path) -> None:
    words = ["environment=guess_number", "data=environment", "model=agent", "evaluate.samples=2", *SMALL]
    done = command("rlkit.evaluate", *words, "evaluate.questions=8", f"run_dir={tmp_path / 'episodes'}")
    assert done.returncode == 0, done.stderr
    answers = rows(tmp_path / "episodes")
    assert len(answers) == 16 and all(row["turns"] and row["ended"] for row in answers)
    (line,) = result(tmp_path / "episodes")["lines"]
    assert line["kind"] == "accuracy" and line["mean"]["questions"] == 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server of the embedded model."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TORCH_COMPILE_DISABLE": "1"}
    arguments = ["--model", str(ROOT / "rlkit/embedded/policy"), "--served-model-name", "tiny", "--port", str(port)]
    arguments += ["--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--api-key", "a-secret-of-the-test"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        deadline = time.monotonic() + 150
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_server_answers(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: Sequence[str] = ["model=endpoint", f"model.url={server}", "data=arithmetic", "evaluate.questions=16"]
    words = [*words, "evaluate.samples=2", "evaluate.greedy=true", "rollout.max_response_tokens=64"]
    monkeypatch.delenv("TINY_TOKEN", raising=False)
    refused = command("rlkit.evaluate", *words, "model.token_env=TINY_TOKEN", f"run_dir={tmp_path / 'refused'}")
    assert refused.returncode == 2 and "the environment has no TINY_TOKEN" in refused.stderr
    monkeypatch.setenv("TINY_TOKEN", "a-secret-of-the-test")
    done = command("rlkit.evaluate", *words, "model.token_env=TINY_TOKEN", f"run_dir={tmp_path / 'served'}")
    assert done.returncode == 0, done.stderr
    sampled, greedy = result(tmp_path / "served")["lines"]
    assert (sampled["answers"], greedy["answers"], sampled["left_out"]) == (32, 16, 0)
    assert sampled["length"]["value"] > 1, "the server counts tokens"
    assert "a-secret-of-the-test" not in (tmp_path / "served/config.yaml").read_text()

    # The same model answers alike where it is loaded here.
    here = ["data=arithmetic", "evaluate.questions=16", "evaluate.samples=0", "evaluate.greedy=true", *SMALL]
    loaded = command("rlkit.evaluate", *here, "rollout.max_response_tokens=64", f"run_dir={tmp_path / 'here'}")
    assert loaded.returncode == 0, loaded.stderr
    own = {row["prompt_id"]: row["response"] for row in rows(tmp_path / "here")}
    theirs = {row["prompt_id"]: row["response"] for row in rows(tmp_path / "served") if row["decoding"] == "greedy"}
    assert sum(own[question] == theirs[question] for question in own) >= 14


def test_a_wrong_token_ends_it_with_the_server_s_word(server: str, tmp_path: Path) -> None:
    os.environ["WRONG_TOKEN"] = "another-secret-of-the-test"
    words = ["model=endpoint", f"model.url={server}", "model.name=tiny", "model.token_env=WRONG_TOKEN"]
    done = command("rlkit.generate", *words, "data=arithmetic", "evaluate.questions=4", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1 and "401" in done.stderr
    assert not (tmp_path / "run/samples.jsonl").exists(), "the folder is free for another try"


@pytest.mark.parametrize(
    ("packages", "file", "language", "command_of", "reported"),
    [
        (("inspect-ai==0.3.285", "openai"), "questions.py", "python", "inspect eval", "pass_at_2"),
        (("lm-eval[api]==0.4.13",), "questions.yaml", "yaml", "lm_eval run", "exact_match"),
    ],
    ids=["inspect", "lm_eval"],
)
def test_other_harnesses_ask_as_the_page_says(
    server: str, tmp_path: Path, packages: Sequence[str], file: str, language: str, command_of: str, reported: str
) -> None:
    """With the page's own task and command."""
    blocks = re.findall(
        r"^```(\w+)\n(.*?)^```", (ROOT / "docs/harnesses.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    (task,) = [text for kind, text in blocks if kind == language]
    (typed,) = [text for kind, text in blocks if kind == "console" and command_of in text]
    (tmp_path / file).write_text(task)
    asked = [{"question": f"What is {n} + 2?", "answer": f"{n} + 2 = {n + 2} #### {n + 2}"} for n in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for old, new in (("http://127.0.0.1:8000/v1", server), ("SECRET", "a-secret-of-the-test"), ("policy", "tiny")):
        assert old in typed
        typed = typed.replace(old, new)
    python = own_python(tmp_path.parent, *packages)
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", typed], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert reported in done.stdout, done.stdout[-2000:]


def test_answers_alone(trained: Run, tmp_path: Path) -> None:
    done = command(
        "rlkit.generate", f"run={trained.folder}", "evaluate.questions=5", f"run_dir={tmp_path / 'answers'}", *SMALL
    )
    assert done.returncode == 0, done.stderr
    answers = rows(tmp_path / "answers")
    assert len(answers) == 5 and all(row["response"] and row["correct"] is None for row in answers)
    assert " ".join(answers[0]["response"].split()) in done.stdout
    assert "accuracy" not in done.stdout


def test_a_run_s_answers_under_another_reward(trained: Run) -> None:
    done = command("rlkit.rescore", str(trained.folder), "reward=polar")
    assert done.returncode == 0, done.stderr
    assert "rank correlation" in done.stdout and "Loading weights" not in done.stdout + done.stderr
    head, *rescored = rows(trained.folder / "rescored", "polar")
    recorded = rows(trained.folder)
    assert head["reward"]["_target_"] == "rewards.polar.reward.PolarReward"
    assert [(row["step"], row["group_id"], row["sample"]) for row in rescored] == [
        (row["step"], row["group_id"], row["sample"]) for row in recorded
    ]
    assert all(row["valid"] and row["reward"] is not None for row in rescored)


def test_a_look_at_a_checkpoint(trained: Run) -> None:
    said = "What is 2 plus 3?\n/prompt\n/reset\n/system Be brief.\n/set top_p=7\n/quit\nnever read\n"
    done = command("rlkit.chat", str(trained.folder), "temperature=0", "max_tokens=40", given=said)
    assert done.returncode == 0, done.stderr
    assert "step_000002/policy" in done.stdout and "<|user|>What is 2 plus 3?<|assistant|>" in done.stdout
    assert "top_p=7: must be a number, above 0 and at most 1" in done.stdout
    again = command("rlkit.chat", str(trained.folder), "temperature=0", "max_tokens=40", given=said)
    assert again.stdout == done.stdout
