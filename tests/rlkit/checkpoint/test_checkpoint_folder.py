"""Checkpoints on disk: sealed whole or not at all, checked byte by byte, pruned, found, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_fixture import make_groups

from rlkit.checkpoint.folder import (
    BadCheckpointError,
    open_checkpoint,
    prune,
    seal,
    sealed_folders,
    set_aside_after,
    stage,
)
from rlkit.checkpoint.resume import find_resume
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.schema import RunConfig
from rlkit.experience import Group, GroupScores, PreferencePair, Score, Span, SpanReward
from rlkit.experience.records import from_json, to_json


def config_of(run_dir: Path, *overrides: str) -> RunConfig:
    return load_config(["reward=rule", f"run_dir={run_dir}", *overrides]).config


def make(
    checkpoints: Path,
    step: int,
    config: RunConfig | None = None,
    best: float | None = None,
    evaluated: Sequence[int] = (),
) -> Path:
    staged = stage(checkpoints, step)
    (staged / "policy").mkdir()
    (staged / "policy" / "weights").write_bytes(b"w" * step)
    (staged / "run.json").write_text(json.dumps({"accuracies": {str(at): 0.5 for at in evaluated}}))
    about = {"step": step, "best": best, "config": None if config is None else config.model_dump(mode="json")}
    return seal(staged, about).path


def test_records_come_back_to_the_last_bit() -> None:
    group = make_groups()[0]
    sample = replace(group.samples[0], mask=np.arange(len(group.samples[0])) % 2 == 0, spans=(Span(0, 1, "turn"),))
    odd = Score(
        0.1 + 0.2,
        token_rewards=np.random.default_rng(0).standard_normal(len(sample)).astype(np.float32),
        span_rewards=(SpanReward(0, 1, 1 / 3),),
        components={"a": np.pi},
        ensemble=(1.0, 2.0),
        trace="déjà vu",
    )
    scores = GroupScores((odd, *(s for _, s in group.scored()[1:])), (PreferencePair(0, 2, 0.7),), greedy=Score(0.0))
    prompt = replace(group.prompt, columns={"tests": ["a", {"b": None}], "pair": (1, 2.5)})
    group = replace(group, prompt=prompt, samples=(sample, *group.samples[1:]), scores=scores, greedy=sample)
    back: Group = from_json(json.loads(json.dumps(to_json(group))))
    assert to_json(back) == to_json(group)
    assert back.prompt == group.prompt and isinstance(back.samples, tuple)
    assert back.samples[0].logprobs.dtype == np.float32 and back.samples[0].mask is not None
    np.testing.assert_array_equal(back.samples[0].logprobs, group.samples[0].logprobs)
    assert back.scores is not None and group.scores is not None
    np.testing.assert_array_equal(back.scores.samples[0].token_rewards, odd.token_rewards)


@pytest.mark.parametrize("strange", [object(), {1: 2}, {"__record__": "Group"}, {"a": {1, 2}}, np.array([None])])
def test_what_could_not_come_back_is_refused(strange: Any) -> None:
    with pytest.raises(TypeError, match="cannot be saved in a checkpoint"):
        to_json(strange)


def test_a_checkpoint_whose_successor_cannot_take_its_place_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path, 3, best=0.25)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("stale file handle")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="stale"):
            make(tmp_path, 3, best=0.5)
    stage(tmp_path, 4)
    assert open_checkpoint(first).manifest["best"] == 0.25
    make(tmp_path, 3, best=0.5)
    assert open_checkpoint(first).manifest["best"] == 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003"]


def test_only_a_sealed_folder_has_a_checkpoints_name(tmp_path: Path) -> None:
    staged = stage(tmp_path, 3)
    (staged / "half").write_text("x")
    assert sealed_folders(tmp_path) == []
    make(tmp_path, 4)  # removes what was cut short
    assert not staged.exists()
    assert [folder.name for folder in sealed_folders(tmp_path)] == ["step_000004"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "is not in format"),
        (lambda f: (f / "policy" / "weights").unlink(), "policy/weights is missing"),
        (lambda f: (f / "policy" / "weights").write_bytes(b"w"), "has 1 bytes, not 5"),
        (lambda f: (f / "policy" / "weights").write_bytes(b"wwwwW"), "is damaged"),
    ],
)
def test_every_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, damage: Any, message: str) -> None:
    config = config_of(tmp_path, "resume=auto")
    make(tmp_path / "checkpoints", 2, config)
    broken = make(tmp_path / "checkpoints", 5, config)
    damage(broken)
    with pytest.raises(BadCheckpointError, match=message):
        open_checkpoint(broken)
    point = find_resume(config)
    assert point is not None and point.checkpoint.step == 2 and point.same_run
    assert "step_000005 skipped" in point.notices[0] and message in point.notices[0]
    damage(tmp_path / "checkpoints" / "step_000002") if "bytes" not in message else (
        tmp_path / "checkpoints" / "step_000002" / "policy" / "weights"
    ).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is intact"):
        find_resume(config)


def test_epochs_are_as_many_steps_as_the_data_say(tmp_path: Path) -> None:
    """`trainer.total_steps` is only its default then: nothing is compared with it."""
    config = config_of(tmp_path, "resume=auto", "trainer.total_epochs=3")
    default = config.trainer.total_steps
    trained = config.model_copy(update={"trainer": config.trainer.model_copy(update={"total_steps": 3 * default})})
    make(tmp_path / "checkpoints", default, trained)
    point = find_resume(config)
    assert point is not None and point.notices == ()
    assert point.nothing_left(3 * default) is None
    assert f"has all {default} steps" in (point.nothing_left(default) or "")


def test_weights_of_sources_may_change_and_are_said(tmp_path: Path) -> None:
    mixture = ["data=mixture", "data.sources.a.kind=arithmetic", "data.sources.b.kind=arithmetic"]
    make(tmp_path / "checkpoints", 2, config_of(tmp_path, *mixture))
    point = find_resume(config_of(tmp_path, *mixture, "data.sources.b.weight=3", "resume=auto"))
    assert point is not None and point.notices[0] == "data.sources.b.weight was null and is 3 now"
    with pytest.raises(ConfigError, match=r"data\.sources\.b\.largest"):
        find_resume(config_of(tmp_path, *mixture, "data.sources.b.largest=30", "resume=auto"))


def test_a_folder_that_only_a_diagnostic_wrote_into_is_free(tmp_path: Path) -> None:
    """As one leaves it that ends a run before its first record."""
    for name in ("diagnostics", "tokens", "logs"):
        (tmp_path / name).mkdir()
    config_of(tmp_path)


def test_a_last_evaluation_that_did_not_end_is_left_to_do(tmp_path: Path) -> None:
    config = config_of(tmp_path, "resume=auto", "trainer.total_steps=2")
    for evaluated, left in (([], False), ([0], True), ([0, 2], False)):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        make(tmp_path / "checkpoints", 2, config, evaluated=evaluated)
        point = find_resume(config)
        assert point is not None and (point.nothing_left(2) is None) == left


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, best in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.8)):
        make(tmp_path, step, best=best)
    gone = prune(tmp_path, keep=2)
    assert sorted(folder.name for folder in gone) == ["step_000001", "step_000003"]
    assert [folder.name for folder in sealed_folders(tmp_path)] == ["step_000005", "step_000004", "step_000002"]
    assert not list(tmp_path.glob(".*"))


def test_the_best_is_the_earliest_of_equal_ones_and_never_not_a_number(tmp_path: Path) -> None:
    for step, best in ((1, float("nan")), (2, 0.9), (3, 0.9), (4, 0.1), (5, 0.2)):
        make(tmp_path, step, best=best)
    prune(tmp_path, keep=1)
    assert [folder.name for folder in sealed_folders(tmp_path)] == ["step_000005", "step_000002"]


def test_going_back_puts_the_later_ones_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    set_aside_after(tmp_path, 4)
    make(tmp_path, 5)
    assert prune(tmp_path, keep=2) == [tmp_path / "step_000002"]
    assert [folder.name for folder in sealed_folders(tmp_path)] == ["step_000005", "step_000004"]
    assert (tmp_path / "abandoned_step_000008" / "manifest.json").is_file()
    set_aside_after(tmp_path, 4)  # once more, from the same place
    assert [folder.name for folder in sealed_folders(tmp_path)] == ["step_000004"]


def test_a_file_that_another_node_wrote_elsewhere_is_missed_before_old_checkpoints_go(tmp_path: Path) -> None:
    staged = stage(tmp_path, 1)
    with pytest.raises(BadCheckpointError, match=r"learner\.safetensors did not arrive .* all of them share"):
        seal(staged, {"step": 1}, ["learner.safetensors"])
    assert sealed_folders(tmp_path) == []


def test_a_run_without_checkpoints_begins(tmp_path: Path) -> None:
    assert find_resume(config_of(tmp_path, "resume=auto")) is None
    assert find_resume(config_of(tmp_path, "resume=never")) is None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("algorithm.samples_per_prompt=3", "algorithm.samples_per_prompt: is 3, but .* was made with 8"),
        ("algorithm=rloo", "algorithm._target_: is algorithms.rloo.RLOO"),
        ("data.max_bad_row_share=0.5", "data.max_bad_row_share"),
        ("seed=7", "seed: is 7"),
        ("trainer.total_steps=1", "trainer.total_steps=1: .* already has 2 steps"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(
    tmp_path: Path, override: str, named: str
) -> None:
    make(tmp_path / "checkpoints", 2, config_of(tmp_path))
    with pytest.raises(ConfigError, match=named):
        find_resume(config_of(tmp_path, "resume=auto", override))


def test_a_next_stage_may_have_longer_responses(tmp_path: Path) -> None:
    """Also where options of the algorithm follow from their length."""
    for recipe, option in (("dapo", "overlong_max_tokens"), ("dr_grpo", "constant_length")):
        sizes = f"algorithm={recipe}", "trainer.prompts_per_step=16", "rollout.max_prompt_tokens=256"
        old = tmp_path / recipe
        make(old / "checkpoints", 2, config_of(old, *sizes, "rollout.max_response_tokens=256"))
        point = find_resume(config_of(tmp_path / "new", *sizes, f"resume={old}", "rollout.max_response_tokens=512"))
        assert point is not None
        assert point.notices[:2] == (
            "rollout.max_response_tokens was 256 and is 512 now",
            f"algorithm.{option} was 256 and is 512 now",
        )


def test_what_may_differ_is_said(tmp_path: Path) -> None:
    path = make(tmp_path / "old" / "checkpoints", 2, config_of(tmp_path / "old"))
    for name in (path, tmp_path / "old"):
        point = find_resume(config_of(tmp_path / "new", f"resume={name}", "learner.learning_rate=1e-5"))
        assert point is not None and not point.same_run
        assert point.notices == (
            "learner.learning_rate was 0.0003 and is 1e-05 now",
            f"to keep the old values: run_dir={tmp_path / 'old'} "
            f"--config {tmp_path / 'old' / 'config.yaml'} resume=auto",
        )
    (path / "run.yaml").touch()
    point = find_resume(config_of(tmp_path / "new", f"resume={path}", "learner.learning_rate=1e-5"))
    assert point is not None and f"--config {path / 'run.yaml'} resume=auto" in point.notices[1]
    with pytest.raises(ConfigError, match="there is no such folder"):
        find_resume(config_of(tmp_path / "new", f"resume={tmp_path / 'nowhere'}"))
