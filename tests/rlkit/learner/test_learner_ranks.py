"""Two learner ranks (real processes, gloo) do what one does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import LIMIT_SECONDS, build_learner, free_port, write_partitioned_model, write_tiny_model
from learner_rank import (
    FOUR_RANKS,
    RANKS,
    SCENARIOS,
    SHARED_MODELS,
    bytes_asked_of_one_rank,
    moved_reference,
    outcome,
    scenario_groups,
    shared_states,
)
from paths import FIXTURES, PYTHONPATH
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from algorithms.base import Experience
from rlkit.config.schema import LearnerConfig
from rlkit.learner.dealing import policy_shares
from rlkit.learner.state import full_state, load_full_state
from rlkit.weights.tensor_file import TensorFile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tiny")
    write_partitioned_model(folder / "partitioned")
    write_partitioned_model(folder / "tied", tied=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks write."""
    return tmp_path_factory.mktemp("ranks")


QUICK = (
    "zero 0",
    "partitioned by zero 3, checkpointing",
    "unequal",
    "two optimizer steps",
    "ppo, partitioned by zero 3",
    "pairs",
    "adapter, partitioned by zero 3",
    "shared sequences, partitioned by zero 3, checkpointing",
    "shared sequences, ppo, segments",
)
"""Each way once; the others are slow tests."""


@pytest.fixture(scope="module")
def ranks(model: Path, folder: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank found, for all scenarios that are asked for."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {own["name"] for own in parameters if "name" in own}
    return run_ranks(model, folder, RANKS, [name for name in SCENARIOS if name in asked])


def run_ranks(model: Path, folder: Path, ranks: int, scenarios: Sequence[str]) -> list[dict[str, Any]]:
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        command = [
            sys.executable,
            str(FIXTURES / "learner_rank.py"),
            str(rank),
            port,
            str(model),
            str(folder / f"{rank}"),
            str(ranks),
            json.dumps(scenarios),
        ]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}", weights_only=False) for rank in range(ranks)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in SCENARIOS]
)
def test_two_ranks_do_what_one_does(model: Path, ranks: list[dict[str, Any]], name: str) -> None:
    check_outcome(model, ranks, name)


@pytest.mark.slow  # four processes on two cores
def test_four_ranks_that_share_sequences_do_what_one_does(model: Path, tmp_path: Path) -> None:
    ranks = run_ranks(model, tmp_path, 4, list(FOUR_RANKS))
    for name in FOUR_RANKS:
        check_outcome(model, ranks, name)


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_ranks_that_share_sequences_have_the_states_of_one(ranks: list[dict[str, Any]], name: str) -> None:
    """Also with windows, soft caps, sinks, values narrower than keys, and fewer key-value heads than ranks."""
    wanted, wanted_gradients = shared_states(name, None)
    for found in ranks:
        states, gradients = found["models"][name]
        torch.testing.assert_close(states, wanted, atol=1e-5, rtol=1e-4)
        assert gradients.keys() == wanted_gradients.keys()
        for key, gradient in wanted_gradients.items():
            atol = 1e-5 * float(gradient.abs().max())
            torch.testing.assert_close(gradients[key], gradient, atol=atol, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def check_outcome(model: Path, ranks: list[dict[str, Any]], name: str) -> None:
    wanted, wanted_weights, wanted_signals = outcome(model, name)
    for rank, found in enumerate(ranks):
        metrics, weights, signals = found[name]
        for want, have in zip(wanted, metrics, strict=True):
            assert want.keys() == have.keys()
            for key, value in want.items():
                assert have[key] == pytest.approx(value, rel=3e-4, abs=3e-6), f"{key} of rank {rank}"
        assert metrics == ranks[0][name][0], "metrics must be equal on all ranks"
        for key, weight in wanted_weights.items():
            torch.testing.assert_close(weights[key], weight, atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        for of_one, of_ranks in zip(wanted_signals, signals, strict=True):
            assert of_one.keys() == of_ranks.keys()
            for sample, rows in of_one.items():
                assert rows.keys() == of_ranks[sample].keys()
                for key, row in rows.items():
                    np.testing.assert_allclose(of_ranks[sample][key], row, atol=3e-5, rtol=3e-4, err_msg=key)


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
    for name in ("unequal", "known references, zero 3"):
        real = [sum(size > 0 for size in rank) for rank in microbatches(name)]
        assert real[0] != real[1]
    assert microbatches("a silent step") == [[0], [0]]
    assert [sizes[-1] for sizes in microbatches("a silent optimizer step")] == [0, 0]


def test_one_rank_knows_the_size_of_a_checkpoint(model: Path, ranks: list[dict[str, Any]]) -> None:
    """Its adapter's factors are partitioned; nothing is gathered for it."""
    one = bytes_asked_of_one_rank(model / "partitioned", rank=0)
    assert ranks[1]["bytes"] is None and ranks[0]["bytes"] == one


def test_every_group_has_the_run_s_limit(ranks: list[dict[str, Any]]) -> None:
    assert [found["limits"] for found in ranks] == [{LIMIT_SECONDS}] * 2


def test_ranks_skip_together(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["skipped"] == {0: [1, 0], 1: [1, 0]}


def test_a_reference_that_zero_3_holds_moves_as_another(model: Path, ranks: list[dict[str, Any]]) -> None:
    """Small parameters, which ranks keep whole beside their shares, too."""
    start, wanted = moved_reference(model / "tiny", 1)
    assert np.abs(wanted - start).max() > 0.01
    for found in ranks:
        np.testing.assert_allclose(found["moved"][1], wanted, atol=1e-3)


def test_zero_3_holds_shares_from_the_first_moment_on(ranks: list[dict[str, Any]]) -> None:
    """While it loads, before and after a step; the reference, too."""
    for found in ranks:
        for moment, shares in found["saved"]["held"].items():
            assert len(shares) == 9 and all(shares.values()), (moment, shares)


def test_what_two_ranks_wrote_is_whole_and_another_stage_resumes_from_it(
    model: Path, ranks: list[dict[str, Any]], folder: Path
) -> None:
    first, second = (found["saved"] for found in ranks)
    assert first["same"] and second["same"]
    assert second["written"] is None and second["weights"] == []
    for written in (first["written"], *first["weights"]):
        data = written.path.read_bytes()
        assert (len(data), hashlib.blake2b(data, digest_size=16).hexdigest()) == (written.bytes, written.blake2b)
    state = load_file(folder / "learner.safetensors")
    assert state.keys() == first["state"].keys()
    assert all(torch.equal(state[name], value) for name, value in first["state"].items())
    saved = AutoModelForCausalLM.from_pretrained(folder / "policy").state_dict()
    one = build_learner(model / "partitioned", zero_stage=1)
    load_full_state(one.engine, TensorFile(folder / "learner.safetensors"))
    assert all(torch.equal(full_state(one.engine)[name], value) for name, value in state.items())
    assert all(torch.equal(saved[name], tensor) for name, tensor in one.named_weights())
