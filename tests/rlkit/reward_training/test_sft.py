"""Supervised fine-tuning: the loss covers the answer and its end, and the command leaves a model folder."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from rlkit import sft as command
from rlkit.config.schema import LearnerConfig
from rlkit.data.arithmetic import Arithmetic, ArithmeticConfig
from rlkit.data.base import Problem
from rlkit.experience import Message
from rlkit.models.folder import model_folder
from rlkit.reward_training import sft

POLICY = model_folder("embedded:policy")
SMALL = ["data.train_problems=256", "data.heldout_problems=64", "cluster.threads_per_actor=1"]


@pytest.fixture(scope="module")
def process_group() -> None:
    """One rank; DeepSpeed wants a group even for that."""
    import torch.distributed as dist

    from rlkit.learner.engine import init_process_group

    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        init_process_group(0, 1, "127.0.0.1", port, "cpu")


@pytest.fixture(scope="module")
def tokenizer():
    from rlkit.data.rendering import load_tokenizer

    return load_tokenizer(POLICY)


def _problems(count: int) -> list[Problem]:
    return Arithmetic(ArithmeticConfig(train_problems=count), seed=0).load("train")[0]


def test_examples_ask_as_the_sampler_is_asked_and_end_as_it_ends(tokenizer) -> None:
    problems = _problems(8)
    examples, skipped = sft.make_examples(problems, tokenizer, max_prompt_tokens=256, max_target_tokens=128)
    assert skipped == [] and [len(references) for references in examples] == [4] * 8
    for problem, references in zip(problems, examples, strict=True):
        for reference, example in zip(problem.references, references, strict=True):
            assert tokenizer.decode(example.prompt) == f"<|user|>{problem.messages[0].content}<|assistant|>"
            assert tokenizer.decode(example.target) == f"{reference}<eos>"


def test_unusable_rows_are_named_not_dropped_silently(tokenizer) -> None:
    no_reference = Problem(id="empty", messages=(Message("user", "1+1?"),), origin="file:1")
    examples, skipped = sft.make_examples([no_reference, *_problems(3)], tokenizer, 256, max_target_tokens=3)
    assert examples == []
    assert [row.reason for row in skipped if row.origin == "empty"] == ["it has no reference"]
    too_long = [row for row in skipped if row.reason == "every reference has more than 3 tokens"]
    assert len(too_long) == 3
    assert all(row.remedy.startswith("Raise rollout.max_response_tokens (the longest has ") for row in too_long)


def test_every_epoch_visits_every_problem_once(tokenizer) -> None:
    examples, _ = sft.make_examples(_problems(12), tokenizer, 256, 128)
    batches = sft.draw_batches(examples, size=4, seed=3)
    for _ in range(2):
        prompts = [example.prompt for _ in range(3) for example in next(batches)]
        assert sorted(prompts) == sorted(references[0].prompt for references in examples)


def test_loss_is_the_plain_models_on_the_target_alone(process_group: None, tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rlkit.reward_training.sft_learner import SupervisedLearner

    examples = [references[0] for references in sft.make_examples(_problems(5), tokenizer, 256, 128)[0]]
    learner = SupervisedLearner(POLICY, LearnerConfig(tokens_per_microbatch=64), device="cpu", total_steps=1)
    model = AutoModelForCausalLM.from_pretrained(POLICY).eval()
    total = 0.0
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.target]])
        labels = torch.tensor([[-100] * len(example.prompt) + list(example.target)])
        total += model(input_ids=ids, labels=labels).loss.item() * len(example.target)
    expected = total / sum(len(example.target) for example in examples)
    assert learner.evaluate(examples) == pytest.approx(expected, rel=1e-4)


def test_micro_batches_do_not_change_the_step(process_group: None, tokenizer) -> None:
    import torch

    from rlkit.reward_training.sft_learner import SupervisedLearner

    examples = [references[1] for references in sft.make_examples(_problems(9), tokenizer, 256, 128)[0]]
    weights = []
    for tokens in (64, 16384):
        config = LearnerConfig(learning_rate=1e-3, tokens_per_microbatch=tokens, max_grad_norm=1e9)
        learner = SupervisedLearner(POLICY, config, device="cpu", total_steps=1)
        learner.step(examples)
        weights.append(torch.cat([p.detach().flatten() for p in learner.training.engine.module.parameters()]))
    # AdamW's first step is lr * sign(gradient) nearly everywhere; a gradient near zero may differ by rounding.
    differing = (weights[0] - weights[1]).abs() > 1e-5
    assert differing.float().mean() < 1e-3


def test_the_command_lowers_the_heldout_loss_and_saves_a_plain_model(tmp_path: Path, capsys) -> None:
    arguments = [*SMALL, f"run_dir={tmp_path / 'run'}", "trainer.total_steps=25", "trainer.prompts_per_step=16"]
    assert command.main([*arguments, "learner.learning_rate=2e-4", "trainer.evaluate_every_steps=10"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 10, 20, 25]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")
    assert model.generation_config.eos_token_id == loaded.eos_token_id
    assert loaded.chat_template
    assert "held-out loss" in capsys.readouterr().out


def test_keys_without_effect_are_refused_before_anything_starts(tmp_path: Path, capsys) -> None:
    assert command.main(["algorithm=grpo", "tracking.console=off", f"run_dir={tmp_path / 'run'}"]) == 2
    report = capsys.readouterr().err
    assert "algorithm=grpo: has no effect" in report and "tracking.console=off: has no effect" in report
    assert not (tmp_path / "run").exists()


def test_dry_run_starts_nothing(tmp_path: Path, capsys) -> None:
    assert command.main([f"run_dir={tmp_path / 'run'}", "dry_run=true"]) == 0
    assert "valid" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    summaries = []
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        command = [sys.executable, "-m", "rlkit.sft", *SMALL, f"run_dir={run_dir}", "trainer.total_steps=3"]
        options = [f"learner.ranks={ranks}", f"learner.zero_stage={ranks - 1}", "learner.tokens_per_microbatch=768"]
        subprocess.run([*command, *options], check=True, cwd=ROOT, capture_output=True, timeout=240)
        summaries.append(json.loads((run_dir / "summary.json").read_text()))
    for key in ("loss", "heldout_loss_before", "heldout_loss_after"):
        assert summaries[0][key] == pytest.approx(summaries[1][key], rel=1e-4)
