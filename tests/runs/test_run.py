"""Whole runs on the real stack: what they leave on disk, how they end, and that nothing stays behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from run_fixture import ROOT, Run

pytestmark = pytest.mark.ray
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
STEPS = 3
ENDLESS = "trainer.total_steps=100000"
Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts runs and kills what the test leaves of them."""
    runs: list[Run] = []

    def begin(*arguments: str, **options: Any) -> Run:
        folder = tmp_path / f"{len(runs)}"
        folder.mkdir()
        runs.append(Run(folder, *arguments, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean_up()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that saved and evaluated in the middle, too."""
    run = Run(
        tmp_path_factory.mktemp("finished"),
        f"trainer.total_steps={STEPS}",
        "trainer.save_every_steps=1",
        "trainer.keep_checkpoints=9",
        "trainer.evaluate_every_steps=2",
        "learner.minibatches_per_step=2",
        "learner.learning_rate=1e-3",
    )
    assert run.end() == 0, run.text
    yield run
    run.clean_up()


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.records() if "policy/loss" in record]


def test_summary_says_what_happened(finished: Run) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["reward_failed"] == 0
    assert summary["accuracy_by_step"].keys() == {"0", "2", "3"}
    assert summary["accuracy_before"] == summary["accuracy_by_step"]["0"]
    assert summary["accuracy_after"] == summary["accuracy_by_step"]["3"]
    assert all(0 <= accuracy <= 1 for accuracy in summary["accuracy_by_step"].values())
    assert 0 < summary["seconds_per_step"] * STEPS <= summary["wall_seconds"]
    assert Path(summary["policy"]).is_dir()


def test_run_folder_is_complete(finished: Run) -> None:
    assert yaml.safe_load((finished.folder / "config.yaml").read_text())["trainer"]["total_steps"] == STEPS
    assert list((finished.folder / "tensorboard").iterdir())
    steps = [folder.name for folder in sorted((finished.folder / "checkpoints").iterdir())]
    assert steps == [f"step_{step:06d}" for step in range(1, STEPS + 1)]
    assert (finished.folder / "logs").is_dir()
    assert finished.left_after(10) == []


def test_its_configuration_starts_the_same_run_again(finished: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlkit.train", "--config", str(finished.folder / "config.yaml")]
    again = subprocess.run(
        [*command, f"run_dir={tmp_path / 'again'}", "dry_run=true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert again.returncode == 0, again.stderr


def test_metrics_are_finite_and_the_sampler_is_the_learner(finished: Run) -> None:
    steps = steps_of(finished)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for step, record in enumerate(steps, start=1):
        numbers = {name: value for name, value in record.items() if name not in ("time", "kind")}
        wrong = {name: value for name, value in numbers.items() if not isinstance(value, int | float)}
        assert not wrong
        assert all(math.isfinite(value) for value in numbers.values())
        assert record["mismatch/logprob_max"] < 1e-3
        assert record["weights/canary_difference"] < 1e-3
        assert record["weights/version"] == step
        assert record["policy/optimizer_steps"] == 2 * step
        assert record["policy/skipped_updates"] == 0
        assert record["reward/failed"] == 0
        assert record["policy/entropy"] > 0
        assert record["policy/trained_samples"] == 16
    assert finished.unexplained() == set()
    assert steps[-1]["kl/reference"] > 0, "three updates left the policy where it was"


def test_every_response_of_every_group_is_kept(finished: Run) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "checkpoints" / "step_000003" / "policy")
    groups = defaultdict(list)
    for row in finished.records("samples"):
        groups[row["step"], row["group_id"]].append(row)
    assert len(groups) == 4 * STEPS
    assert len({group_id for _, group_id in groups}) == 4 * STEPS
    for (step, _), rows in groups.items():
        ranked = {row["rank"]: row for row in rows}
        assert ranked.keys() == {"best", "worst", None}
        best, worst = ranked["best"], ranked["worst"]
        assert best["reward"] >= worst["reward"]
        assert best["advantage"] >= worst["advantage"]
        assert (best["reward"] > worst["reward"]) == (best["advantage"] > 0)
        for i, row in enumerate(rows):
            assert row["response"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
            assert row["reward"] == row["components"]["correct"] == row["correct"], "reward and verifier are the same"
            assert row["policy_versions"] == [step - 1, step - 1], "not sampled with the newest weights"
            assert row["length"] == len(row["token_ids"]) <= 48
            assert (row["staleness"], row["dropped"], row["verdict"]) == (0, None, None)
            assert (row["sample"], row["group_size"]) == (i, len(rows))
            assert row["group_rewards"] == [other["reward"] for other in rows]
            assert row["prompt"]


def test_the_signals_of_tokens_are_those_of_the_step(finished: Run) -> None:
    """Of all four groups; the weights before step 3 are those of step 2's checkpoint."""
    import numpy as np
    import torch
    from pyarrow import parquet
    from transformers import AutoModelForCausalLM, AutoTokenizer

    samples = {(row["step"], row["group_id"], row["sample"]): row for row in finished.records("samples")}
    folder = finished.folder / "checkpoints" / "step_000002" / "policy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sorted(file.name for file in (finished.folder / "tokens").iterdir()) == [
        f"step_{step:06d}.parquet" for step in range(1, STEPS + 1)
    ]
    moved, first = 0.0, 0
    for row in parquet.read_table(finished.folder / "tokens" / "step_000003.parquet").to_pylist():
        sample = samples[3, row["group_id"], row["sample"]]
        assert row["token_id"] == sample["token_ids"]
        assert "".join(row["piece"]) == sample["response"]
        assert np.mean(row["advantage"]) == pytest.approx(sample["advantage"], abs=1e-6)
        assert (set(row["mask"]), set(row["version"])) == ({True}, {2})
        prompt = tokenizer.apply_chat_template(sample["prompt"], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row["token_id"]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(row["token_id"])[:, None])[:, 0].numpy()
        for name in ("logprob_sampler", "logprob_learner"):
            np.testing.assert_allclose(row[name], expected, atol=1e-3, err_msg=name)
        if np.allclose(row["ratio"], 1, atol=1e-5):  # of the first mini-batch: the others saw an updated policy
            first += 1
            np.testing.assert_allclose(row["entropy"], -(logits.exp() * logits).sum(-1).numpy(), atol=1e-2)
        assert "logprob_reference" in row and not {"weight", "value", "process_reward"} & row.keys()
        decided = zip(row["clipped"], row["ratio"], row["advantage"], strict=True)
        assert all(clipped == (a != 0 and (ratio > 1.2 if a > 0 else ratio < 0.8)) for clipped, ratio, a in decided)
        moved = max(moved, np.abs(np.subtract(row["ratio"], 1)).max())
    assert first
    assert moved > 1e-4, "the second mini-batch came after an update"


def test_saved_policy_loads_in_plain_transformers(finished: Run) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [finished.folder / "checkpoints" / f"step_{step:06d}" / "policy" for step in (1, STEPS)]
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=48, do_sample=False)
    assert len(tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)) > 5
    kept = (folders[1] / "generation_config.json").read_text()
    assert kept == (ROOT / "rlkit" / "embedded" / "policy" / "generation_config.json").read_text()
    first, last = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.slow
def test_saved_policy_loads_in_vllm(finished: Run) -> None:
    from rlkit.rollout.engine import engine_environment

    policy = finished.folder / "checkpoints" / "step_000003" / "policy"
    program = (
        "from vllm import LLM, SamplingParams\n"
        f"llm = LLM({str(policy)!r}, dtype='float32', enforce_eager=True, max_model_len=256)\n"
        "messages = [{'role': 'user', 'content': 'Tom has 3 apples. He buys 4 more. How many apples does Tom have?'}]\n"
        "print('ANSWER', llm.chat(messages, SamplingParams(max_tokens=48, temperature=0))[0].outputs[0].text)\n"
    )
    environment = {**os.environ, **engine_environment("cpu", 1), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=180, check=False
    )
    assert "ANSWER" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_ctrl_c_ends_everything(start: Start) -> None:
    run = start(ENDLESS)
    run.wait_for_steps(1)
    assert len(run.processes()) > 4
    run.interrupt()
    assert run.end(30) == 130, run.text
    assert "interrupted" in run.text
    assert "Traceback" not in run.text
    assert run.left_after(5) == []


@pytest.mark.slow
def test_ctrl_c_while_actors_start(start: Start) -> None:
    run = start(ENDLESS)
    run.wait_until(lambda: "loading the sampler" in run.text)
    run.interrupt()
    assert run.end(60) == 130, run.text
    assert run.left_after(5) == []


@pytest.mark.slow
def test_sigterm_ends_everything(start: Start) -> None:
    run = start(ENDLESS)
    run.wait_for_steps(1)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(30) == 143, run.text
    assert "SIGTERM" in run.text
    assert "Traceback" not in run.text
    assert run.left_after(5) == []


@pytest.mark.slow
def test_kill_leaves_nothing_either(start: Start) -> None:
    run = start(ENDLESS)
    run.wait_for_steps(1)
    run.process.kill()
    run.process.wait()
    assert run.left_after(30) == []


BROKEN_REWARD = """
from rewards.base import Reward, RewardConfig


class Broken(Reward):
    def score(self, groups):
        raise ConnectionError("the judge of the test is on holiday")
"""


@pytest.mark.slow
def test_a_reward_that_always_raises_stops_the_run_and_says_why(start: Start, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(BROKEN_REWARD)
    run = start("reward._target_=my_rewards.Broken", ENDLESS, cwd=tmp_path)
    assert run.end() == 1, run.text
    assert "my_rewards.Broken" in run.text
    explained = run.text.partition("\nrlkit: ")[2]
    assert "the judge of the test is on holiday" in explained
    assert "Traceback" not in explained
    assert not steps_of(run), "it trained on failures"
    assert run.left_after(10) == []


@pytest.mark.slow
def test_filters_that_reject_everything_stop_the_run_and_say_which(start: Start) -> None:
    run = start("buffer.min_group_reward=0.99", "buffer.drop_equal_rewards=true", ENDLESS)
    assert run.end() == 1, run.text
    assert "buffer.min_group_reward" in run.text
    assert "max_rejected_share" in run.text
    assert "Traceback" not in run.text
    assert "ExceptionGroup" not in run.text
    assert "RayTaskError" not in run.text
    assert "buffer.py" in (run.folder / "logs" / "driver.log").read_text(), "where it happened is on disk"
    assert run.left_after(10) == []


@pytest.mark.slow
def test_asynchronous_training_stays_within_its_staleness(start: Start) -> None:
    run = start("trainer.max_staleness=2", "trainer.total_steps=6", "tracking.sample_groups_per_step=null")
    assert run.end() == 0, run.text
    assert len(steps_of(run)) == 6
    rows = run.records("samples")
    n = len({row["group_id"] for row in rows}) // 6
    assert {(row["step"], row["group_id"]) for row in rows} == {(i // n + 1, f"{i:08d}") for i in range(6 * n)}
    ages = [row["step"] - 1 - row["policy_versions"][0] for row in rows]
    assert set(ages) <= {0, 1, 2}
    assert 2 in ages, "nothing was sampled ahead"
    assert any(len(row["version_spans"]) > 1 for row in rows), "no response lived through new weights"
    for record in steps_of(run):
        assert record["weights/canary_difference"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [["rollout.workers=2"], ["learner.sequence_parallel=2"]])
def test_two_ranks(start: Start, options: list[str]) -> None:
    run = start("learner.ranks=2", "learner.zero_stage=2", "trainer.total_steps=2", *options)
    assert run.end() == 0, run.text
    for record in steps_of(run):
        assert record["mismatch/logprob_max"] < 1e-3
    assert run.left_after(10) == []


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k/train.jsonl")
def test_gsm8k_from_a_file(start: Start) -> None:
    run = start("data=jsonl", f"data.path={GSM8K}", "reward=rule", "trainer.total_steps=2")
    assert run.end() == 0, run.text
    assert len(steps_of(run)) == 2


@pytest.mark.slow
def test_a_killed_learner_ends_the_run_with_an_error(start: Start) -> None:
    run = start(ENDLESS)
    run.wait_for_steps(1)
    (victim,) = [process for process in run.processes() if "ray::LearnerWorker" in " ".join(process.cmdline())]
    victim.kill()
    assert run.end(60) == 1, run.text
    explained = run.text.partition("--- end of ")[2]
    assert explained.startswith("learner-0.log")
    assert "end of rollout-0.log" not in explained, "another actor's log explains nothing"
    assert f"rlkit: a rank of the learner (process {victim.pid}) died" in explained
    assert "ActorDiedError" not in explained
    assert run.left_after(10) == []


def listening(run: Run) -> dict[str, list[str]]:
    """Addresses on which processes of the run listen -> by whom."""
    addresses: dict[str, list[str]] = defaultdict(list)
    for process in run.processes():
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                addresses[connection.laddr.ip].append(process.name())
    return addresses


@pytest.mark.slow
def test_a_signal_saves_the_last_whole_step_and_nothing_listens_beyond_loopback(start: Start) -> None:
    """Ctrl-C as in a terminal: all processes of the group get it."""
    run = start(ENDLESS)
    run.wait_for_steps(2)
    addresses = listening(run)
    assert addresses, "nothing listens?"
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses
    run.interrupt()
    assert run.end(60) == 130, run.text
    steps = len(steps_of(run))
    assert [folder.name for folder in (run.folder / "checkpoints").iterdir()] == [f"step_{steps:06d}"], run.text
    assert f"saved after step {steps}" in run.text
    assert run.left_after(5) == []


EASY = """
from rewards.base import Reward, RewardConfig
from rlkit.experience import GroupScores, Score


class Easy(Reward):
    def score(self, groups):
        return [GroupScores(tuple(Score(VALUE) for _ in group.samples)) for group in groups]
"""


@pytest.mark.slow
def test_a_run_that_has_solved_its_data_ends_well(start: Start, tmp_path: Path) -> None:
    (tmp_path / "easy_rewards.py").write_text(EASY.replace("VALUE", "1.0"))
    run = start("reward._target_=easy_rewards.Easy", "buffer.drop_equal_rewards=true", ENDLESS, cwd=tmp_path)
    assert run.end() == 0, run.text
    assert "the data are solved" in run.text
    assert "the data are solved" in json.loads((run.folder / "summary.json").read_text())["ended"]


@pytest.mark.slow
def test_a_run_in_which_no_group_differs_says_that_nothing_was_learnt(start: Start, tmp_path: Path) -> None:
    (tmp_path / "easy_rewards.py").write_text(EASY.replace("VALUE", "0.0"))
    run = start("reward._target_=easy_rewards.Easy", "trainer.total_steps=6", cwd=tmp_path)
    assert run.end() == 0, run.text
    assert "nothing was learnt in the first 5 steps" in run.text
    assert "nothing was learnt in this run" in run.text
    assert json.loads((run.folder / "summary.json").read_text())["nothing_learnt"] is True
