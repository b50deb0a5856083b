"""Whole runs that train an adapter: it learns, on-policy and from recorded responses, and what it leaves loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_fixture import need
from run_fixture import OF_SAMPLING, Run
from safetensors.numpy import load_file

from rlkit.models.folder import model_folder

need("peft", "lora")
pytestmark = pytest.mark.slow
ADAPTER = ("model.lora.rank=8", "learner.learning_rate=3e-3")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def one(*arguments: str, recorded: bool = False) -> Run:
        runs.append(Run(tmp_path, *ADAPTER, *arguments, without=OF_SAMPLING if recorded else ()))
        return runs[-1]

    yield one
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def check_what_is_left(run: Run, steps: int) -> None:
    """The adapter's file is small and belongs to the model; the policy's is whole, under the model's own names."""
    folder = run.folder / "checkpoints" / f"step_{steps:06d}"
    base = load_file(model_folder("embedded:policy") / "model.safetensors")
    policy = load_file(folder / "policy" / "model.safetensors")
    assert policy.keys() == base.keys()
    changed = {name for name, tensor in policy.items() if (tensor != base[name]).any()}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in adapter}
    assert changed == {f"{layer}.weight" for layer in layers}
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(model_folder("embedded:policy")) and about["r"] == 8


@pytest.mark.parametrize("publish", ["adapter", "merged"])
def test_grpo_learns(start: Callable[..., Run], publish: str) -> None:
    steps = 12
    run = start(
        f"model.lora.publish={publish}",
        f"trainer.total_steps={steps}",
        "trainer.prompts_per_step=32",
        "algorithm.samples_per_prompt=8",
        "trainer.evaluation_prompts=256",
        "trainer.evaluate_every_steps=0",
    )
    assert run.end() == 0, run.text
    accuracy = [one["accuracy/heldout"] for one in run.records() if "accuracy/heldout" in one]
    assert accuracy[-1] > accuracy[0] + 0.2
    of_steps = [one for one in run.records() if one["kind"] == "step"]
    assert max(one["weights/canary_difference"] for one in of_steps) < 1e-4
    assert of_steps[0]["kl/reference"] == 0 and of_steps[-1]["kl/reference"] > 1e-3
    check_what_is_left(run, steps)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_recorded_responses_are_learnt(start: Callable[..., Run], algorithm: str, tmp_path: Path) -> None:
    steps, data = 4, []
    if algorithm == "dpo":
        rows = ({"prompt": f"{i} + {i}", "chosen": f"{i} + {i} = {2 * i}", "rejected": "0"} for i in range(40))
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ["data=pairs", f"data.path={tmp_path / 'pairs.jsonl'}"]
    run = start(f"algorithm={algorithm}", f"trainer.total_steps={steps}", *data, recorded=True)
    assert run.end() == 0, run.text
    losses = [one["policy/loss"] for one in run.records() if "policy/loss" in one]
    assert losses[-1] < losses[0]
    check_what_is_left(run, steps)
