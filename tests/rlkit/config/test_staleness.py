"""`trainer.max_staleness` above 0: corrected unless told otherwise, said in the plan, refused where nothing can."""

from __future__ import annotations

from pathlib import Path

import pytest

from algorithms.base import Advantages, Algorithm, Experience, LossInputs, LossOutput
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun
from rlkit.config.report import plan


class Plain(Algorithm):
    """An algorithm whose loss knows nothing of older policies."""

    def advantages(self, experience: Experience) -> Advantages:
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> LossOutput:
        raise NotImplementedError


def load(tmp_path: Path, *overrides: str) -> ResolvedRun:
    return load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", *overrides])


def staleness_line(run: ResolvedRun) -> str | None:
    return next((line.amount for line in plan(run) if line.what == "staleness"), None)


def warnings(run: ResolvedRun, key: str) -> list[str]:
    return [str(warning) for warning in run.warnings if key in str(warning)]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce_pp", "remax"])
def test_stale_samples_get_truncated_weights_by_default(algorithm: str, tmp_path: Path) -> None:
    run = load(tmp_path, f"algorithm={algorithm}", "trainer.max_staleness=1")
    section = run.config.algorithm
    assert (section["rollout_correction"], section["largest_weight"]) == ("truncate", 2.0)
    assert staleness_line(run) == "at most 1 version; importance weights truncated at 2.0"
    assert not warnings(run, "max_staleness")


def test_synchronous_training_stays_as_it_was(tmp_path: Path) -> None:
    run = load(tmp_path)
    assert (run.config.algorithm["rollout_correction"], run.config.algorithm["largest_weight"]) == ("none", None)
    assert staleness_line(run) is None


def test_no_correction_is_a_choice_with_a_warning(tmp_path: Path) -> None:
    run = load(tmp_path, "trainer.max_staleness=1", "algorithm.rollout_correction=none")
    assert run.config.algorithm["rollout_correction"] == "none"
    assert "as if they were the current one's" in "".join(warnings(run, "max_staleness"))


def test_a_ratio_to_the_sampler_needs_no_weights(tmp_path: Path) -> None:
    run = load(tmp_path, "trainer.max_staleness=4", "algorithm.anchor=rollout", "algorithm.kl_coefficient=0")
    assert run.config.algorithm["rollout_correction"] == "none" and not warnings(run, "max_staleness")
    assert staleness_line(run) == "at most 4 versions; the loss's ratio is to the sampler"


def test_a_nucleus_and_a_correction_do_not_go_together(tmp_path: Path) -> None:
    run = load(tmp_path, "trainer.max_staleness=1", "rollout.top_p=0.9")
    assert "multiplies every token" in "".join(warnings(run, "rollout_correction"))


def test_a_loss_that_cannot_weight_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the loss of Plain cannot weight them"):
        load(tmp_path, "algorithm._target_=test_staleness.Plain", "trainer.max_staleness=1")
    load(tmp_path, "algorithm._target_=test_staleness.Plain")


def test_work_at_once_on_shared_gpus_is_said(tmp_path: Path) -> None:
    shared = load(tmp_path, "trainer.max_staleness=1", "cluster=single_gpu")
    assert "neither frees memory" in "".join(warnings(shared, "max_staleness"))
