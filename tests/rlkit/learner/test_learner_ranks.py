"""Two learner ranks (real processes, gloo) do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_fixture import free_port, write_partitioned_model, write_tiny_model
from learner_rank import RANKS, SCENARIOS, outcome, scenario_groups
from paths import FIXTURES, PYTHONPATH

from algorithms.base import Experience
from rlkit.config.schema import LearnerConfig
from rlkit.learner.dealing import policy_shares


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tiny")
    write_partitioned_model(folder / "partitioned")
    return folder


@pytest.fixture(scope="module")
def ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for all scenarios."""
    folder, port = tmp_path_factory.mktemp("ranks"), str(free_port())
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        command = [
            sys.executable,
            str(FIXTURES / "learner_rank.py"),
            str(rank),
            port,
            str(model),
            str(folder / f"{rank}"),
        ]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS, "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_do_what_one_does(model: Path, ranks: list[dict[str, Any]], name: str) -> None:
    wanted, wanted_weights = outcome(model, name)
    for rank, found in enumerate(ranks):
        metrics, weights = found[name]
        for want, have in zip(wanted, metrics, strict=True):
            assert want.keys() == have.keys()
            for key, value in want.items():
                assert have[key] == pytest.approx(value, rel=3e-4, abs=3e-6), f"{key} of rank {rank}"
        assert metrics == ranks[0][name][0], "metrics must be equal on all ranks"
        for key, weight in wanted_weights.items():
            torch.testing.assert_close(weights[key], weight, atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_scenarios_are_what_their_names_say() -> None:
    def microbatches(name: str) -> list[list[int]]:
        """Samples of each micro-batch, by rank."""
        scenario = SCENARIOS[name]
        groups = scenario_groups(scenario)
        config = LearnerConfig(**{**scenario.learner, "ranks": RANKS})
        advantages = scenario.algorithm.advantages(Experience(groups, 1))
        shares, _ = policy_shares(groups, advantages, config, scenario.algorithm.needs())
        return [
            [0 if rows is None else len(micro.lengths) for m in share.minibatches for micro, rows in m.microbatches]
            for share in shares
        ]

    assert microbatches("one whole group") == [[3], [0]]
    assert sorted(microbatches("one group")) == [[1], [2]]
    real = [sum(size > 0 for size in rank) for rank in microbatches("unequal")]
    assert real[0] != real[1]
    assert microbatches("a silent step") == [[0], [0]]
    assert [sizes[-1] for sizes in microbatches("a silent optimizer step")] == [0, 0]


def test_ranks_skip_together(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["skipped"] == {0: [1, 0], 1: [1, 0]}
