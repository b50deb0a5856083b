"""Every recipe of conf/algorithm runs to the end on the embedded task, with the real stack."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_fixture import OF_SAMPLING, ROOT, Run
from safetensors.torch import load_file, save_file

RECIPES = sorted(file.stem for file in (ROOT / "conf" / "algorithm").glob("*.yaml"))
OF_TURNS = {"turn_grpo": "maze", "gigpo": "maze", "ppo_turns": "maze", "igpo": "hidden_facts"}
OF_STEPS = ("prime", "pure", "grpo_process", "rloo_process", "episode_plus_step", "turn_discounted")
"""Recipes that need process rewards."""
PROMPTS = 16
"""DAPO and CISPO cut a step into 16 optimizer steps."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def another_policy(folder: Path) -> Path:
    """The embedded policy with other weights."""
    teacher = folder / "teacher"
    shutil.copytree(ROOT / "rlkit" / "embedded" / "policy", teacher)
    weights = load_file(teacher / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {name: w + 0.01 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(noisy, teacher / "model.safetensors", {"format": "pt"})
    return teacher


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_to_the_end(recipe: str, start: list[Run], tmp_path: Path) -> None:
    reward = ["reward=implicit_prm", "reward.learning_rate=1e-4"] if recipe in OF_STEPS else []
    reward += ["rollout.judge=always"] if recipe == "cream" else []  # which reads no rewards
    reward += [f"algorithm.guide={ROOT / 'rlkit' / 'embedded' / 'policy'}"] if recipe == "tgdpo" else []
    reward += [f"environment={OF_TURNS[recipe]}"] if recipe in OF_TURNS else []
    single = ["algorithm.samples_per_prompt=1"] if recipe in ("ppo", "ppo_turns", "reinforce_pp", "remax") else []
    reward += [f"algorithm.teacher={another_policy(tmp_path)}"] if recipe == "distill" else []
    few = ["algorithm.k=2"] if recipe == "passk" else []  # of the small runs' 4 samples
    run = Run(
        tmp_path,
        f"algorithm={recipe}",
        f"trainer.prompts_per_step={PROMPTS}",
        "trainer.total_steps=2",
        f"rollout.max_response_tokens={384 if recipe in OF_TURNS else 96}",
        *reward,
        *single,
        *few,
        without={"sft": OF_SAMPLING, "distill": ("reward",), **dict.fromkeys(OF_TURNS, ("reward",))}.get(recipe, ()),
    )
    start.append(run)
    assert run.end() == 0, run.text
    steps = [record for record in run.records() if record.get("kind") == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    assert run.unexplained() == set()
    for step in steps:
        assert step["policy/trained_samples"] > 0
        # Before its first update the implicit PRM is its reference: all process rewards are 0, which is all that
        # grpo_process learns from.
        learns = (recipe, step["step"]) != ("grpo_process", 1)
        assert (step["policy/grad_norm"] > 0) == learns and math.isfinite(step["policy/loss"])
        assert step.get("weights/canary_difference", 0.0) < 1e-3
        assert ("weights/canary_difference" in step) == (recipe != "sft"), "nothing samples for fine-tuning"
    assert (run.folder / "checkpoints" / "step_000002" / "policy" / "model.safetensors").is_file()
    if recipe == "remax":
        assert 0 <= steps[-1]["reward/greedy_mean"] <= 1
    if recipe == "ppo":
        assert "critic/explained_variance" in steps[-1]
    if recipe == "brpo":
        assert 0 <= steps[-1]["brpo/dropped_share"] < 1 and 0 < steps[-1]["brpo/win_share"] < 1
    if recipe in OF_STEPS[1:]:
        assert steps[-1]["steps/count"] > 1 and math.isfinite(steps[-1]["steps/worst"])
    if recipe in OF_STEPS:
        assert (run.folder / "checkpoints" / "step_000002" / "reward" / "model.safetensors").is_file()
        assert steps[-1]["prm/pair_accuracy"] >= 0


@pytest.mark.slow
def test_what_a_teacher_samples_is_imitated(start: list[Run], tmp_path: Path) -> None:
    """Its engine gets no weights, and waits for none."""
    teacher = another_policy(tmp_path)
    source = ("rollout.source=model", f"rollout.source_path={teacher}")
    run = Run(tmp_path, "algorithm=sft", *source, "trainer.total_steps=3", without=("reward",))
    start.append(run)
    assert run.end() == 0, run.text
    steps = [record for record in run.records() if record.get("kind") == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["policy/grad_norm"] > 0 for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (
            "algorithm=ppo",
            "algorithm.samples_per_prompt=2",
            "reward.outcome._target_=rewards.verifiers.math.MathReward",
        ),
        ("algorithm=prime", "reward.reference=policy"),
        ("algorithm=prime", "reward.update=before"),
        ("algorithm=prime", "algorithm.mode=official"),
        ("algorithm=prime", "algorithm.mode=verl"),
        ("algorithm=prime", "algorithm.estimator=grpo"),
        ("algorithm=prime", "algorithm.estimator=reinforce", "reward.objective=dpo"),
        ("algorithm=rloo_process", "reward.outcome=null", "reward.update=none", "algorithm.process_coefficient=0"),
        ("algorithm=pure", "rollout.steps=lines"),
    ],
    ids=lambda options: " ".join(options),
)
def test_ways_to_use_the_implicit_prm(options: tuple[str, ...], start: list[Run], tmp_path: Path) -> None:
    # samples_per_prompt of the small runs is 4
    run = Run(
        tmp_path,
        "reward=implicit_prm",
        *options,
        "trainer.total_steps=2",
        "buffer.min_group_reward=null",
        "buffer.max_group_reward=null",
        "reward.learning_rate=1e-4",
    )
    start.append(run)
    assert run.end() == 0, run.text
    last = run.records()[-2]
    assert last["kind"] == "step" and math.isfinite(last["policy/loss"])
    assert run.unexplained() == set()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grpo_process", "episode_plus_step"])
def test_a_function_that_rewards_steps(recipe: str, start: list[Run], tmp_path: Path) -> None:
    """Of responses as they were sampled, beside an outcome."""
    run = Run(
        tmp_path,
        f"algorithm={recipe}",
        "reward=[math,function]",
        "reward.parts.function.function=reward_functions.lengths_of_steps",
        "reward.parts.function.per_step=true",
        "rollout.steps=lines",
        "trainer.total_steps=2",
        cwd=ROOT / "tests" / "fixtures",
    )
    start.append(run)
    assert run.end() == 0, run.text
    steps = [record for record in run.records() if record.get("kind") == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["steps/count"] >= 1 and step["steps/worst"] < 0
        assert step["reward/failed"] == 0 and step["policy/grad_norm"] > 0
