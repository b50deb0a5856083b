"""Real runs with an environment and the embedded policy: turns, resume, a rollout worker that dies in mid-episode."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import HARMS
from paths import ROOT
from pyarrow import parquet
from run_fixture import Run
from test_resume import kill_at, what_it_did

COUNTING = (
    "environment._target_=counting.Counting",
    "data=environment",
    "verifier=environment",
    "algorithm=grpo",
    "environment.max_turn_tokens=12",
    "rollout.max_response_tokens=96",
    "learner.learning_rate=1e-3",
)
SAVING = ("trainer.save_every_steps=1", "trainer.keep_checkpoints=9")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def one(name: str, *arguments: str) -> Run:
        (tmp_path / name).mkdir(exist_ok=True)
        inline = () if any("placement" in word for word in arguments) else ("environment.placement=inline",)
        words = ("reward=environment", *COUNTING, *inline, *arguments)
        runs.append(Run(tmp_path / name, *words, cwd=ROOT / "tests" / "fixtures", without=("reward",)))
        return runs[-1]

    yield one
    for run in runs:
        run.clean_up()


@pytest.mark.slow
def test_a_run_of_episodes(start: Callable[..., Run]) -> None:
    run = start("run", "trainer.total_steps=2", "tracking.sample_groups_per_step=null")
    assert run.end() == 0, run.text
    steps = [record for record in run.records() if record["kind"] == "step"]
    assert len(steps) == 2 and run.unexplained() == set()
    for record in steps:
        assert 1 <= record["environment/turns"] <= 3
        assert 0 <= record["environment/success"] <= 1
        assert record["environment/observation_tokens"] > 0
        assert 0 < record["environment/wait_share"] < 1
        assert record["environment/malformed_share"] == 0 and record["reward/failed"] == 0
        assert record["mismatch/logprob_max"] < 1e-3, "what was sampled is what is trained on"
        assert record["accuracy/train"] == record["environment/success"]
    (before,) = [r for r in run.records() if r["kind"] == "evaluation" and r["step"] == 0]
    assert 0 <= before["accuracy/heldout"] <= 1
    for sample in run.records("samples"):
        turns = sample["turns"]
        assert [turn["role"] for turn in turns[:2]] == ["assistant", "user"]
        assert sample["response"] == [turn["content"] for turn in turns if turn["role"] == "assistant"][-1]
        assert sample["prompt"][0]["content"].startswith("Count on from")
        assert sample["reward"] == pytest.approx(sum(turn.get("reward", 0) for turn in turns))
        assert sample["ended"] in ("done", "turns", "tokens") and sample["success"] in (True, False)
    rows = parquet.read_table(run.folder / "tokens" / "step_000002.parquet").to_pylist()
    for row in rows:
        assert [version == -1 for version in row["version"]] == [not trained for trained in row["mask"]]
        assert [logprob is None for logprob in row["logprob_sampler"]] == [not trained for trained in row["mask"]]
        assert {1, -1} == set(row["version"])
        assert len(row["piece"]) == len(row["token_id"]) and any(row["process_reward"])
    assert run.left_after(10) == []


ANEW = ("environment.history=rerender", f"model.chat_template={ROOT / 'tests/fixtures/forgetful.jinja'}")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ANEW], ids=["append", "rerender"])
def test_a_killed_and_resumed_run_equals_one_that_was_not(start: Callable[..., Run], how: tuple[str, ...]) -> None:
    options = (*SAVING, *how, "trainer.total_steps=4")
    whole = start("whole", *options)
    assert whole.end() == 0, whole.text
    broken = start("broken", *options, "resume=auto")
    kill_at(broken, lambda: (broken.folder / "checkpoints" / "step_000002").exists())
    again = start("broken", *options, "resume=auto")
    assert again.end() == 0, again.text
    one, other = what_it_did(whole), what_it_did(again)
    for part in one:
        assert one[part] == other[part], part
    steps = [record for record in whole.records() if record["kind"] == "step"]
    assert all(record["mismatch/logprob_max"] < 1e-3 for record in steps), "what was sampled is what is trained on"
    assert any(record.get("environment/segments", 1) > 1.5 for record in steps) == bool(how)
    if how:
        rows = [sample for sample in whole.records("samples") if len(sample["turns"]) > 4]
        assert rows and all(len(sample["segments"]) > 1 for sample in rows)


@pytest.mark.slow
def test_where_an_environment_runs_and_when_it_answers_does_not_matter(start: Callable[..., Run]) -> None:
    """Nor that the run was killed and resumed."""
    options = (*SAVING, "trainer.total_steps=4")
    whole = start("whole", *options)
    assert whole.end() == 0, whole.text
    for placement in ("inline", "worker"):
        slow = (f"environment.placement={placement}", "environment._target_=counting.Slow", "resume=auto")
        slow += ("environment.workers=2",) if placement == "worker" else ()
        broken = start(placement, *options, *slow)
        kill_at(broken, lambda folder=broken.folder: (folder / "checkpoints" / "step_000002").exists())  # type: ignore[misc]
        again = start(placement, *options, *slow)
        assert again.end() == 0, again.text
        one, other = what_it_did(whole), what_it_did(again)
        for part in one:
            assert one[part] == other[part], (placement, part)


@pytest.mark.slow
def test_new_weights_come_while_episodes_go_on(start: Callable[..., Run]) -> None:
    options = ("algorithm=rloo", "trainer.max_staleness=2", "tracking.sample_groups_per_step=null")
    run = start("stale", *options, "environment._target_=counting.Slow", "trainer.total_steps=5")
    assert run.end() == 0, run.text
    steps = [record for record in run.records() if record["kind"] == "step"]
    assert len(steps) == 5 and all(record["reward/failed"] == 0 for record in steps)
    assert steps[0]["mismatch/logprob_max"] < 1e-3 and steps[-1]["environment/turns"] > 1
    assert all(record["staleness/max"] <= 2 for record in steps[1:])
    assert any(record["staleness/mixed_share"] > 0 for record in steps[1:])


@pytest.mark.slow
def test_an_environment_that_misbehaves_costs_its_own_episodes_alone(start: Callable[..., Run], tmp_path: Path) -> None:
    log = tmp_path / "harm.txt"
    run = start(
        "chaos",
        "environment._target_=chaos.Unruly",
        f"environment.log={log}",
        "environment.placement=worker",
        "environment.workers=2",
        "environment.step_timeout_seconds=2",
        "environment.retries=0",
        "environment.max_observation_tokens=60",
        f"trainer.prompts_per_step={len(HARMS)}",
        "trainer.total_steps=2",
        "reward.max_failed_share=1",
        "tracking.sample_groups_per_step=null",
    )
    assert run.end() == 0, run.text
    done = Counter(log.read_text().splitlines())
    assert done.keys() == HARMS.keys(), "each harm is done"
    expected = Counter({kind: 0 for kind in HARMS.values() if kind})
    for harm, times in done.items():
        if HARMS[harm]:
            expected[HARMS[harm]] += times
    steps = [record for record in run.records() if record["kind"] == "step"]
    for kind, times in expected.items():
        assert sum(record.get(f"environment/failed/{kind}", 0) for record in steps) == times, kind
    assert sum(record["reward/failed"] for record in steps) == expected.total()
    for record in steps:
        valid = 4 * len(HARMS) - record["reward/failed"]
        assert 0 < record["policy/trained_samples"] <= valid and record["policy/grad_norm"] > 0
        assert record["mismatch/logprob_max"] < 1e-3
    for sample in run.records("samples"):
        assert sample["ended"] != "failed" or sample["reward"] is None
        for turn in sample["turns"]:
            assert len(turn["content"]) < 10_000
    shown = [turn["content"] for sample in run.records("samples") for turn in sample["turns"]]
    assert any("567[...]345" in text for text in shown), "ten megabytes are cut"
    assert any("<|assistant|>4<eos><|user|>" in text for text in shown)
    assert run.left_after(10) == []


@pytest.mark.slow
def test_a_process_that_dies_in_mid_episode_is_replaced_without_a_trace(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    """Inline, the environment takes the rollout worker with it; in a process of its own only the other episodes."""
    options = ("trainer.total_steps=2", "tracking.sample_groups_per_step=null")
    undisturbed = start("undisturbed", *options)
    assert undisturbed.end() == 0, undisturbed.text
    for placement in ("inline", "worker"):
        died = tmp_path / f"{placement}.died"
        dies = (f"environment.dies={died}", f"environment.placement={placement}")
        run = start(placement, *options, *dies, "environment.retries=1")
        assert run.end() == 0, run.text
        assert died.exists()
        assert ("rollout worker 0 died and is being replaced" in run.text) == (placement == "inline")
        assert run.records("samples") == undisturbed.records("samples")
        assert run.left_after(10) == []


@pytest.mark.slow
def test_episodes_that_fail_are_counted_and_above_a_share_end_the_run(start: Callable[..., Run]) -> None:
    run = start(
        "some",
        "trainer.total_steps=2",
        "environment.fails=0.3",
        "reward.max_failed_share=1",
        "verifier.max_failed_share=1",
    )
    assert run.end() == 0, run.text
    steps = [record for record in run.records() if record["kind"] == "step"]
    assert sum(record["reward/failed"] for record in steps) > 0
    assert sum(record.get("environment/failed/failure", 0) for record in steps) == sum(
        r["reward/failed"] for r in steps
    )
    began = time.monotonic()
    ended = start("all", "trainer.total_steps=2", "environment.fails=1")
    assert ended.end() == 1 and time.monotonic() - began < 120
    assert "environment: failure: the abacus is broken" in ended.text
