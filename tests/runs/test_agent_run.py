"""Real runs of an agent that owns its loop: OpenAI's client in a process beside the worker, and the embedded policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT
from run_fixture import Run
from test_resume import what_it_did

CALCULATING = (
    "environment._target_=own_agents.Calculating",
    "environment.max_turns=3",
    "environment.max_turn_tokens=32",
    "model=agent",
    "data=environment",
    "reward=environment",
    "verifier=environment",
    "algorithm=grpo",
    "trainer.total_steps=2",
    "tracking.sample_groups_per_step=null",
)


CONFERRING = (
    "environment._target_=own_agents.Conferring",
    "environment.max_turns=5",
    "environment.max_turn_tokens=16",
    *(word for word in CALCULATING[3:] if "total_steps" not in word),
    "rollout.max_response_tokens=96",
    "trainer.save_every_steps=1",
    "trainer.total_steps=4",
)


@pytest.mark.slow
def test_agents_side_by_side_are_trained_and_twice_the_same(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
        run = Run(
            tmp_path / name,
            *CONFERRING,
            cwd=ROOT / "tests" / "fixtures",
            without=("reward", "rollout.max_response_tokens"),
        )
        try:
            assert run.end() == 0, run.text
            steps = [record for record in run.records() if record["kind"] == "step"]
            for record in steps:
                assert record["environment/turns"] == 5 and record["environment/segments"] == 3
                assert record["reward/failed"] == 0 and record["mismatch/logprob_max"] < 1e-3
                assert record["policy/grad_norm"] > 0
            seen.append(what_it_did(run))
            assert run.left_after(10) == []
        finally:
            run.clean_up()
    for part in seen[0]:
        assert seen[0][part] == seen[1][part], part


@pytest.mark.slow
def test_an_agent_is_trained_and_what_it_did_depends_on_no_clock(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
        words = (*CALCULATING, "rollout.max_response_tokens=128")
        run = Run(
            tmp_path / name, *words, cwd=ROOT / "tests" / "fixtures", without=("reward", "rollout.max_response_tokens")
        )
        try:
            assert run.end() == 0, run.text
            steps = [record for record in run.records() if record["kind"] == "step"]
            assert len(steps) == 2
            for record in steps:
                assert 1 < record["environment/turns"] <= 3 and 0 < record["environment/success"] <= 1
                assert record["reward/failed"] == 0 and record["environment/observation_tokens"] > 0
                assert record["mismatch/logprob_max"] < 1e-3, "what was sampled is what is trained on"
                assert 0 < record["environment/wait_share"] < 1
            assert run.left_after(10) == []
            seen.append(run.records("samples"))
        finally:
            run.clean_up()
    assert seen[0] == seen[1]
    assert {turn["role"] for sample in seen[0] for turn in sample["turns"]} == {"assistant", "tool"}
