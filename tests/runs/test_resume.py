"""kill -9, resume: the run goes on to the last bit as if nothing had happened. Real runs, real processes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_fixture import need
from pyarrow import parquet
from run_fixture import OF_SAMPLING, ROOT, Run
from safetensors.numpy import load_file

STEPS = 4
GRPO = ("algorithm=grpo", "trainer.max_staleness=0")
PRIME = (
    "algorithm=prime",
    "reward=implicit_prm",
    "reward.learning_rate=1e-4",
    "reward.minibatch_groups=2",
    "rollout.max_response_tokens=64",
)
FINE_TUNING = ("algorithm=sft", "learner.learning_rate=1e-3", "learner.epochs_per_step=2")
SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
PREFERENCES = (
    "algorithm=dpo",
    "data=responses",
    f"data.path={SOLUTIONS}",
    "data.max_bad_row_share=0.9",
    "algorithm.reference_every_steps=2",
    "algorithm.reference_mix=0.5",
    "rollout.max_prompt_tokens=300",
    "rollout.max_response_tokens=300",
)
"""Right and wrong solutions of real models; the reference moves."""
ADAPTERS = (*PRIME, "model.lora.rank=8", "model.lora.publish=adapter", "reward.lora.rank=4")
"""Of the policy and of the reward."""
SHAPED = (
    *GRPO,
    "algorithm.samples_per_prompt=8",
    "buffer.drop_equal_rewards=true",
    "buffer.max_rejected_share=0.99",
    "rollout.oversample=1.6",
    'rollout.structured.regex="([0-9]+[*+-][0-9]+=[0-9]+\\n)*#### [0-9]+"',
    "rollout.stop=['=0','9']",
    "rollout.min_p=0.01",
    "trainer.max_mismatch=null",
)
"""Every option of sampling, and more groups than a step takes."""
COMMON = (f"trainer.total_steps={STEPS}", "trainer.save_every_steps=1", "trainer.keep_checkpoints=9")
TIMES = ("time", "tokens/per_second", "environment/wait_share", "evaluation/environment/wait_share")
"""Only what a clock measures may differ."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def one(name: str, *arguments: str, steps: bool = True) -> Run:
        (tmp_path / name).mkdir(exist_ok=True)
        recorded = {"algorithm=sft", "algorithm=dpo"} & set(arguments)
        common = COMMON if steps else ()
        runs.append(Run(tmp_path / name, *common, *arguments, without=OF_SAMPLING if recorded else ()))
        return runs[-1]

    yield one
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def what_it_did(run: Run) -> dict[str, Any]:
    """Metrics without times, samples with the signals of their tokens, and the weights at the end."""
    metrics = [
        {k: v for k, v in record.items() if not k.startswith(TIMES) and k != "seconds"} for record in run.records()
    ]
    last = run.folder / "checkpoints" / f"step_{STEPS:06d}"
    states = [load_file(file) for file in sorted(last.glob("**/*.safetensors"))]
    tensors = [{name: value.tobytes() for name, value in state.items()} for state in states]
    summary = json.loads((run.folder / "summary.json").read_text())
    return {
        "metrics": metrics,
        "samples": run.records("samples"),
        "tokens": {file.name: parquet.read_table(file).to_pylist() for file in (run.folder / "tokens").iterdir()},
        "tensors": tensors,
        "heldout": {name: value for name, value in summary.items() if name.endswith("_by_step")},
    }


def kill_at(run: Run, moment: Callable[[], bool]) -> None:
    """kill -9 of the driver as soon as `moment` is true."""
    end = time.monotonic() + 240
    while not moment():
        assert run.process.poll() is None, run.text
        assert time.monotonic() < end, run.text
        time.sleep(0.002)
    run.process.kill()
    run.process.wait()
    assert run.left_after(30) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [GRPO, PRIME, FINE_TUNING, PREFERENCES, SHAPED, ADAPTERS],
    ids=["grpo", "prime", "sft", "dpo", "shaped", "adapters"],
)
def test_a_killed_and_resumed_run_equals_one_that_was_not(options: tuple[str, ...], start: Callable[..., Run]) -> None:
    if options is ADAPTERS:
        need("peft", "lora")
    whole = start("whole", *options)
    assert whole.end() == 0, whole.text
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    broken = start("broken", *options, "resume=auto")
    checkpoints = broken.folder / "checkpoints"
    # Once at a random moment after the first checkpoint, once in the middle of writing one.
    kill_at(broken, lambda: (checkpoints / "step_000001").exists() and rng.random() < 0.005)
    again = start("broken", *options, "resume=auto")
    kill_at(again, lambda: any(checkpoints.glob(".step_*.partial/policy")) or any(checkpoints.glob("step_000004")))
    last = start("broken", *options, "resume=auto")
    assert last.end() == 0, last.text
    one, other = what_it_did(whole), what_it_did(last)
    for part in one:
        assert one[part] == other[part], f"{part} differ (random seed of the test: {seed})"
    assert not list(checkpoints.glob(".*"))


@pytest.mark.slow
def test_going_on_elsewhere_with_more_steps(start: Callable[..., Run], tmp_path: Path) -> None:
    first = start("first", *GRPO, "trainer.total_steps=2")
    assert first.end() == 0, first.text
    more = start("more", *GRPO, f"resume={first.folder}")
    assert more.end() == 0, more.text
    steps = [record["step"] for record in more.records() if record["kind"] == "step"]
    assert steps == [3, 4]
    done = start("first", *GRPO, "trainer.total_steps=2", "resume=auto")
    assert done.end() == 0
    assert "nothing left to do" in done.text


@pytest.mark.slow
def test_groups_on_their_way_are_asked_for_again(start: Callable[..., Run]) -> None:
    """With stale data a checkpoint is made while groups are sampled: none is lost, none is trained twice."""
    options = ("algorithm=rloo", "trainer.max_staleness=1", "tracking.sample_groups_per_step=null")
    broken = start("stale", *options, "resume=auto")
    kill_at(broken, lambda: (broken.folder / "checkpoints" / "step_000002").exists())
    last = start("stale", *options, "resume=auto")
    assert last.end() == 0, last.text
    trained = {(record["step"], record["group_id"]) for record in last.records("samples")}
    assert trained == {(i // 4 + 1, f"{i:08d}") for i in range(4 * STEPS)}


@pytest.mark.slow
def test_a_run_of_epochs_that_has_all_its_steps_is_not_started_again(start: Callable[..., Run]) -> None:
    epochs = ("algorithm=sft", "data.train_problems=8", "trainer.total_epochs=1", "trainer.save_every_steps=1")
    run = start("epochs", *epochs, steps=False)
    assert run.end() == 0, run.text
    steps = run.records()
    assert max(record["step"] for record in steps) == 2
    again = start("epochs", *epochs, "resume=auto", steps=False)
    assert again.end() == 0 and "nothing left to do" in again.text, again.text
    assert again.records() == steps and (again.folder / "summary.json").exists()
