"""Ranks that share sequences and activations in host memory: what cannot be is refused, and memory is predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.memory import SHAPES, write_model
from rlkit.config.loading import load_config
from rlkit.config.memory import GIB, gpu_phases, processes, total
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun
from rlkit.config.report import plan, plan_text
from rlkit.learner.dealing import passes

EIGHT = ("cluster=multi_gpu", "cluster.gpu_memory_gib=80", "cluster.host_memory_gib=2000")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 attention heads, 4 key-value heads."""
    folder = tmp_path_factory.mktemp("shapes") / "7B"
    write_model(SHAPES["7B"], folder, random=False)
    return folder


def load(model: Path, *overrides: str) -> ResolvedRun:
    base = ["model=hf", f"model.path={model}", "reward=rule", f"run_dir={model.parent}/run", "dry_run=true"]
    return load_config([*base, *EIGHT, *overrides])


def long(response: int, prompt: int = 2048) -> list[str]:
    return [
        f"rollout.max_prompt_tokens={prompt}",
        f"rollout.max_response_tokens={response}",
        f"learner.tokens_per_microbatch={prompt + response}",
    ]


def update(run: ResolvedRun) -> float:
    """GiB of a GPU."""
    return total(gpu_phases(run, 80 * GIB)["update"]) / GIB


def refusal(model: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(model, *overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["learner.ranks=6", "learner.sequence_parallel=4"],
            "learner.sequence_parallel=4: learner.ranks=6 cannot be divided into groups of 4",
        ),
        (["learner.sequence_parallel=8"], "8 ranks cannot share the 28 attention heads and 4 key-value heads"),
        (["learner.sequence_parallel=8"], "equally; 2, 4, 28 can"),
        (
            ["algorithm=ppo", "critic.sequence_parallel=8"],
            "critic.sequence_parallel=8: 8 ranks cannot share the 28 attention heads",
        ),
        (["critic.sequence_parallel=2"], "critic.sequence_parallel=2: has no effect"),
        (
            ["learner.offload_activations=true", "learner.gradient_checkpointing=false"],
            "set learner.gradient_checkpointing=true",
        ),
        (
            ["cluster=local_cpu", "learner.offload_activations=true"],
            "learner.offload_activations=true: moves activations to host memory, where they already are",
        ),
        (["trainer.prompts_per_step=2", "algorithm.samples_per_prompt=2", "learner.ranks=16"], "each of 16 ranks"),
        (
            ["trainer.prompts_per_step=1", "algorithm.samples_per_prompt=3", "learner.sequence_parallel=2"],
            "each of 4 groups of ranks that share sequences",
        ),
        (["learner.ulysses_sequence_parallel_size=2"], "learner.sequence_parallel"),
    ],
)
def test_what_cannot_be_shared_or_moved_is_refused(model: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(model, *overrides)


def test_a_model_that_runs_row_by_row_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "stablelm"}))
    assert "runs row by row" in refusal(folder, "learner.sequence_parallel=2")


def test_groups_of_ranks_are_dealt_samples_as_one(model: Path) -> None:
    run = load(model, "learner.sequence_parallel=4")
    assert run.config.learner.replicas == 2
    assert len(passes([], run.config.learner).microbatches) == 2
    assert "8 DeepSpeed ranks (4 share each sequence)" in plan_text(plan(run))


def test_a_response_of_32k_tokens_of_a_7b_fits_eight_gpus_of_80_gb(model: Path) -> None:
    run = load(model, *long(32768), "learner.sequence_parallel=4")
    assert update(run) < 60
    assert update(load(model, *long(32768))) > update(run) + 12


def test_what_is_too_long_for_one_rank_is_refused_with_what_would_help(model: Path) -> None:
    message = refusal(model, *long(65536))
    named = float(message.split("learner.sequence_parallel=4 (-")[1].split(" GiB")[0])
    needed = float(message.split("would have to hold ")[1].split(" GiB")[0])
    assert update(load(model, *long(65536), "learner.sequence_parallel=4")) == pytest.approx(needed - named, abs=0.2)


def test_offloaded_activations_are_counted_on_the_host(model: Path) -> None:
    runs = [load(model, *long(32768), f"learner.offload_activations={on}") for on in ("false", "true")]
    # 28 layers' inputs of 34,816 tokens x 3,584 x 2 bytes, of which two stay
    moved = 26 * 34816 * 3584 * 2 / GIB
    assert update(runs[0]) - update(runs[1]) == pytest.approx(moved, rel=0.1)
    ranks = [next(p for p in processes(run, 80 * GIB) if p.name == "learner rank") for run in runs]
    host = [total(rank.phases["update"].host) / GIB for rank in ranks]
    assert host[1] - host[0] == pytest.approx(moved * 28 / 26)
