"""Real runs of an agent that owns its loop: OpenAI's client in a process beside the worker, and the embedded policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT
from run_fixture import Run

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
