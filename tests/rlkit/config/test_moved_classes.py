"""Configurations and checkpoints from before classes moved still load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlkit.checkpoint.folder import seal, stage
from rlkit.checkpoint.resume import find_resume
from rlkit.config.loading import load_config
from rlkit.config.parts import Contract, config_text, import_part, plain
from rlkit.reward_training.command import CONTRACTS as REWARD_TRAINING

OLD_TARGETS = [
    "algorithms.grpo.GRPO",
    "algorithms.ppo.PPO",
    "algorithms.prime.PRIME",
    "algorithms.pure.PURE",
    "algorithms.reinforce_pp.ReinforcePP",
    "algorithms.remax.ReMax",
    "algorithms.rloo.RLOO",
    "rewards.code.reward.CodeReward",
    "rewards.combined.reward.CombinedReward",
    "rewards.function.reward.FunctionReward",
    "rewards.implicit_prm.reward.ImplicitPRM",
    "rewards.judge.reward.JudgeReward",
    "rewards.polar.reward.PolarReward",
    "rewards.preference.reward.PreferenceReward",
    "rewards.remote.reward.RemoteReward",
    "rewards.rule.choice.MultipleChoice",
    "rewards.rule.instructions.Instructions",
    "rewards.rule.json_schema.JsonSchema",
    "rewards.rule.length.GroupLength",
    "rewards.rule.length.Length",
    "rewards.rule.match.ExactMatch",
    "rewards.rule.match.RegexMatch",
    "rewards.rule.repetition.Repetition",
    "rewards.rule.reward.RuleReward",
    "rewards.rule.tags.TagFormat",
    "rewards.rule.tool_call.ToolCallMatch",
    "rlkit.data.arithmetic.Arithmetic",
    "rlkit.data.files.HfSource",
    "rlkit.data.files.JsonlSource",
    "rlkit.reward_training.implicit_prm.ImplicitPRMTraining",
    "rlkit.reward_training.polar.PolarTraining",
    "rlkit.reward_training.preference.PreferenceTraining",
]
"""Every `_target_` that conf/ named at 91ba1fe or later."""


@pytest.mark.parametrize("target", OLD_TARGETS)
def test_old_paths_resolve(target: str) -> None:
    kind = {"algorithms": "algorithm", "rewards": "reward"}.get(target.partition(".")[0], "data")
    contract: Contract | None = None
    if "reward_training" in target:
        kind, contract = "reward", REWARD_TRAINING["reward"]

    renamed = {"RuleReward": "MathReward", "JsonlSource": "FileSource", "PURE": "StepCredit"}
    name = target.rpartition(".")[2]
    assert import_part(kind, target, contract).__name__ == renamed.get(name, name)


def test_an_old_file_becomes_a_present_configuration(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    rule = {"_target_": "rewards.rule.reward.RuleReward", "strip_units": True}
    file.write_text(
        yaml.safe_dump({"reward": {"_target_": "rewards.combined.reward.CombinedReward", "parts": {"rule": rule}}})
    )

    run = load_config([f"run_dir={tmp_path / 'run'}"], file)

    assert "rewards.rule" not in config_text(run.config)
    assert run.config.reward["parts"]["rule"]["_target_"] == "rewards.verifiers.math.MathReward"
    assert run.config.reward["parts"]["rule"]["strip_units"] is True


def test_a_checkpoint_made_under_old_names_is_of_the_same_run(tmp_path: Path) -> None:
    run = load_config([f"run_dir={tmp_path / 'run'}", "reward=rule", "resume=auto"])
    text = json.dumps(plain(run.config)).replace("rewards.verifiers.math.MathReward", "rewards.rule.reward.RuleReward")
    old = json.loads(text)
    del old["verifier"]  # a part that came later
    seal(stage(tmp_path / "run" / "checkpoints", 3), {"step": 3, "config": old})

    point = find_resume(run.config)

    assert point is not None
    assert point.checkpoint.step == 3
    assert point.notices == ()


def test_another_verifier_than_the_one_of_old_runs_is_noticed(tmp_path: Path) -> None:
    run = load_config([f"run_dir={tmp_path / 'run'}", "reward=rule", "resume=auto", "verifier=exact_match"])
    old = plain(run.config)
    del old["verifier"]
    seal(stage(tmp_path / "run" / "checkpoints", 3), {"step": 3, "config": old})

    point = find_resume(run.config)

    assert point is not None
    changed = "verifier._target_ was rewards.verifiers.math.MathReward and is rewards.verifiers.match.ExactMatch now"
    assert changed in point.notices
