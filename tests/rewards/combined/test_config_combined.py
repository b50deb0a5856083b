"""`reward=[a,b]` on the command line and in files: what it makes, and what is said about mistakes in it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from combination_rewards import group

from rewards.base import RewardContext
from rewards.polar.reward import PolarReward
from rewards.verifiers.math import MathReward
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun, config_text

Load = Callable[..., ResolvedRun]
Problems = Callable[..., list[str]]
COMBINED = "rewards.combined.reward.CombinedReward"


@pytest.fixture
def load(bare_model: Path) -> Load:
    return lambda *overrides, **more: load_config([f"model.path={bare_model}", *overrides], **more)


@pytest.fixture
def problems(load: Load) -> Problems:
    def refused(*overrides: str, **more: Path) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, **more)
        return [str(problem) for problem in caught.value.problems]

    return refused


def parts(run: ResolvedRun) -> dict[str, Any]:
    found: dict[str, Any] = run.config.reward["parts"]
    return found


def test_a_list_of_options_is_their_combination(load: Load) -> None:
    run = load("reward=[rule,polar]", "reward.parts.polar.weight=0.3", "reward.parts.polar.dtype=float32")
    assert run.config.reward["_target_"] == COMBINED
    assert run.config.run_dir.name.endswith("_grpo_rule+polar")
    assert list(parts(run)) == ["rule", "polar"]
    assert parts(run)["rule"]["_target_"] == "rewards.verifiers.math.MathReward"
    assert parts(run)["polar"]["weight"] == 0.3
    assert parts(run)["polar"]["dtype"] == "float32"
    assert (
        parts(run)["polar"]["wrapper"] == PolarReward.Config.model_fields["wrapper"].default
    )  # every value is spelled out
    assert run.reward_config.timeout_seconds == 2 * MathReward.Config().timeout_seconds


def test_one_part_is_a_way_to_shape_a_single_reward(load: Load) -> None:
    run = load("reward=[polar]", "reward.shaping=[{kind:par,reference_value:0.0}]")
    assert run.config.reward["shaping"][0]["kind"] == "par"
    assert run.config.run_dir.name.endswith("_grpo_polar")


def test_options_of_an_option_file_are_kept(load: Load) -> None:
    """A part takes every field of its option's file, not only its class."""
    from rlkit.config.compose import group_options, option_fields
    from rlkit.config.parts import conf_dir

    folder = conf_dir()
    for option in group_options(folder)["reward"]:
        fields = option_fields(folder, "reward", option)
        if option != "combined" and len(fields) > 1 and "???" not in fields.values():
            played = ["environment=hidden_facts"] if option == "progress" else []
            run = load(*played, f"reward=[{option}]")
            assert fields.items() <= parts(run)[option].items()


def test_names_of_parts(load: Load) -> None:
    run = load("reward=[{small:polar},{large:polar},combination_rewards.Word]", "reward.parts.large.max_references=2")
    assert list(parts(run)) == ["small", "large", "Word"]
    assert parts(run)["large"]["max_references"] == 2
    assert parts(run)["Word"]["_target_"] == "combination_rewards.Word"


def test_routing_takes_one_value_or_a_list(load: Load) -> None:
    run = load(
        "reward=[rule,polar]",
        "reward.parts.rule.when.has=answer",
        "reward.parts.polar.when.lacks=[answer]",
    )
    assert parts(run)["rule"]["when"]["has"] == ["answer"]
    assert parts(run)["polar"]["when"]["lacks"] == ["answer"]


def test_a_column_that_decides_must_be_in_the_data(problems: Problems) -> None:
    (message,) = problems("reward=[rule]", "reward.parts.rule.when.equals.source=[gsm8k,math]")
    assert "needs source with every prompt" in message


def test_the_last_choice_counts(load: Load) -> None:
    assert load("reward=[rule,polar]", "reward=rule").reward_class is MathReward
    assert list(parts(load("reward=rule", "reward=[rule]"))) == ["rule"]


def test_the_written_configuration_loads_again(load: Load, tmp_path: Path) -> None:
    first = load(
        "reward=[rule,{p:polar}]",
        "reward.combine=mean",
        "reward.parts.p.weight=0.5",
        "reward.parts.rule.when.has=answer",
        "reward.parts.p.shaping=[{kind:lsc,reference_value:0.5},group_normalise]",
        "reward.shaping=[{kind:clamp,low:-2}]",
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_text(first.config))
    again = load(file=file)
    assert again.config.reward == first.config.reward
    assert again.reward_config == first.reward_config
    changed = load("reward.parts.p.weight=2", "reward.parts.rule.format_weight=0.1", file=file)
    assert parts(changed)["p"]["weight"] == 2
    assert parts(changed)["rule"]["format_weight"] == 0.1


def test_a_file_may_list_options(load: Load, problems: Problems, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"reward": ["rule", {"p": "polar"}]}))
    run = load("reward.parts.p.weight=2", file=file)
    assert (list(parts(run)), parts(run)["p"]["weight"]) == (["rule", "p"], 2)
    assert any("already sets reward" in message for message in problems("reward=[rule]", file=file))
    file.write_text(yaml.safe_dump({"reward": ["rull"]}))
    assert any(f"{file}: reward: there is no option rull; did you mean rule?" in m for m in problems(file=file))
    file.write_text(yaml.safe_dump({"reward": "rule", "trainer": [1]}))
    found = problems(file=file)
    assert (
        f"{file}: reward=rule: is a section of keys; an option is chosen on the command line, like reward=OPTION"
        in found
    )
    assert any("trainer=[1]: is a section" in message for message in found)


def test_a_file_may_spell_a_combination_out(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    section = {"_target_": "rewards.verifiers.math.MathReward", "format_weight": 0.2}
    file.write_text(yaml.safe_dump({"reward": {"_target_": COMBINED, "parts": {"mine": section}, "combine": "min"}}))
    assert parts(load(file=file))["mine"]["format_weight"] == 0.2


def test_a_combination_inside_a_combination(load: Load, problems: Problems) -> None:
    nested = ["reward=[rule]", f"reward.parts.ensemble._target_={COMBINED}"]
    nested += ["reward.parts.ensemble.parts.a._target_=rewards.polar.reward.PolarReward"]
    run = load(*nested, "reward.parts.ensemble.parts.a.max_references=3", "reward.parts.ensemble.weight=2")
    assert parts(run)["ensemble"]["parts"]["a"]["max_references"] == 3
    (message,) = problems(*nested, "reward.parts.ensemble.parts.a.max_reference=3")
    assert message.endswith("did you mean reward.parts.ensemble.parts.a.max_references?")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=[rul,polar]"], "reward=[rul,polar]: there is no option rul; did you mean rule? available: "),
        (["reward=[rule,zzz9]"], "there is no option zzz9; available: "),
        (["reward=[]"], "reward=[]: needs at least one part, like reward=[rule,polar]"),
        (["reward=[rule,rule]"], "rule is listed twice; give each a name: reward='[{a:rule},{b:rule}]'"),
        (["reward=[{a:rule,b:polar}]"], "must be one name with its option"),
        (["reward=[{a-b:rule}]"], "'a-b' cannot be a part"),
        (["reward=[3]"], "3 is not an option"),
        (["reward=combined"], "reward.parts: needs at least one part; write reward=[rule,polar]"),
        (["reward=[rule]", "reward.parts.rule.format_wight=1"], "did you mean reward.parts.rule.format_weight?"),
        (
            ["reward=[rule,polar]", "reward.parts.rule.max_references=1"],
            "did you mean reward.parts.polar.max_references?",
        ),
        (["reward=[rule,polar]", "reward.max_references=1"], "did you mean reward.parts.polar.max_references?"),
        (
            ["reward=[rule]", "reward.parts.rule.format_weight=-1"],
            "reward.parts.rule.format_weight=-1: must be a number",
        ),
        (["reward=[rule]", "reward.parts.rule.format_weight=true"], "format_weight=true: must be a number"),
        (["reward=[rule]", "reward.parts.rule.weight=x"], "reward.parts.rule.weight=x: must be a number"),
        (["reward=[rule,polar]", "reward.parts.poler.weight=1"], "there is no part poler; did you mean polar?"),
        (["reward=[rule]", "reward.parts.rule.when.hass=[answer]"], "did you mean reward.parts.rule.when.has?"),
        (["reward=[rule]", "reward.combine=avg"], "reward.combine=avg: "),
        (["reward=[rule]", "reward.shaping=[delt]"], "reward.shaping=[delt]: step 1: there is no kind 'delt'"),
        (["reward=[rule]", "reward.parts.rule.shaping=[clip]"], "reward.parts.rule.shaping=[clip]: step 1 (clip): eta"),
        (["reward=[rule]", "reward.spread_weight=2"], "spread_weight has no effect with combine=sum"),
        (["reward=[rule,no.such.Thing]"], "no.such.Thing cannot be imported: there is no module no"),
        (["reward=[polar]", "reward.parts.polar.model_path=/nope"], "reward.parts.polar.model_path: /nope"),
        (["reward=[polar]", "reward.parts.polar.max_length=20000"], "reward.parts.polar.max_length=20000 is more"),
        (["reward=[{a:length}]"], "reward.parts.a: set reward.parts.a.max_tokens, reward.parts.a.min_tokens or both"),
        (["reward=[rule,{b:combined}]"], "reward.parts.b.parts: needs at least one part"),
        (
            ["reward=[polar]", "reward.parts.polar.memory_gib=2"],
            "memory_gib has no effect with backend=transformers",
        ),
        (
            ["reward=[combination_rewards.Weighty]"],
            "cannot be a part: its Config has weight, which every part already has",
        ),
        (["reward=[combination_rewards.Answered]"], "CombinedReward needs rubric with every prompt"),
    ],
)
def test_each_mistake_has_its_message(problems: Problems, overrides: list[str], message: str) -> None:
    found = problems(*overrides)
    assert any(message in each for each in found), found


OWN = """
from pydantic import Field
from rewards.combined.scores import Combiner
from rewards.shaping.steps import OutcomeStep, Step

class Power(OutcomeStep):
    exponent: float = Field(gt=0)
    def apply(self, values, lengths):
        return abs(values) ** self.exponent

class Largest(Combiner):
    offset: float = Field(default=0.0, ge=0)
    def combine(self, values, weights, spread_weight):
        return float(values.max()) + self.offset

class Unfinished(OutcomeStep):
    pass

class Nowhere(Step):
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module."""
    (tmp_path / "own_shaping.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_shaping", raising=False)
    return "own_shaping"


def test_a_users_own_step_and_combiner(load: Load, own: str, tmp_path: Path) -> None:
    run = load(
        "reward=[{a:combination_rewards.Word},{b:combination_rewards.Word}]",
        "reward.parts.b.place=1",
        f"reward.combine={own}.Largest",
        f"reward.shaping=[{{kind:{own}.Power,exponent:2}},{{kind:clamp,high:20}}]",
    )
    assert run.config.reward["combine"] == {"kind": f"{own}.Largest", "offset": 0.0}
    assert run.config.reward["shaping"][0] == {"kind": f"{own}.Power", "exponent": 2.0}
    (tmp_path / "config.yaml").write_text(config_text(run.config))
    again = load("reward.combine={kind: " + own + ".Largest, offset: 1}", file=tmp_path / "config.yaml")
    for config, value in ((run.reward_config, 9.0), (again.reward_config, 16.0)):
        reward = run.reward_class(config, RewardContext())
        assert reward.score([group("2 3")])[0].samples[0].value == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.shaping=[own_shaping.Powr]", "step 1: own_shaping.Powr cannot be imported: "),
        ("reward.shaping=[own_shaping.Powr]", "has no Powr; did you mean own_shaping.Power?"),
        ("reward.shaping=[own_shaping.Power]", "step 1 (own_shaping.Power): exponent is required"),
        ("reward.shaping=[{kind:own_shaping.Power,exponent:true}]", "exponent must be a number, above 0"),
        ("reward.shaping=[own_shaping.Unfinished]", "own_shaping.Unfinished lacks apply(), which every step must have"),
        ("reward.shaping=[own_shaping.Nowhere]", "own_shaping.Nowhere must be a subclass of one of OutcomeStep, "),
        ("reward.shaping=[own_shaping.Largest]", "own_shaping.Largest is not a subclass of rewards.shaping.steps.Step"),
        ("reward.shaping=[no_module.Step]", "step 1: no_module.Step cannot be imported: there is no module no_module"),
        ("reward.combine=meen", "combiner: there is no kind 'meen'; did you mean mean? available: "),
        ("reward.combine={kind:own_shaping.Largest,ofset:1}", "there is no option ofset; did you mean offset?"),
        ("reward.combine=own_shaping.Power", "is not a subclass of rewards.combined.scores.Combiner"),
    ],
)
@pytest.mark.usefixtures("own")
def test_mistakes_with_a_step_or_combiner_of_ones_own(problems: Problems, override: str, message: str) -> None:
    (only,) = problems("reward=[combination_rewards.Word]", override)
    assert message in only


def test_mistakes_are_reported_together(problems: Problems) -> None:
    found = problems(
        "reward=[rul,polar]", "reward.parts.rule.format_wight=1", "reward.parts.polar.max_length=1", "lr=1"
    )
    assert len(found) == 4, found


def test_a_dry_run_from_the_command_line(repository: Path, bare_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlkit.train", "reward=[rule,polar]", "reward.parts.polar.weight=0.3"]
    command += ["dry_run=true", f"model.path={bare_model}", f"run_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"1 worker of CombinedReward", done.stdout)


@pytest.mark.parametrize("part", ["length", "group_length", "repetition"])
def test_rewards_that_look_at_tokens_have_no_reference_responses(part: str, tmp_path: Path) -> None:
    more = ["reward.parts.length.max_tokens=50"] if part == "length" else []
    with pytest.raises(ConfigError, match=f"which {part} cannot; use reference_rewards"):
        load_config(
            [
                f"reward=[polar,{part}]",
                *more,
                "reward.shaping=[{kind:centre,reference_responses:references}]",
                f"run_dir={tmp_path / 'run'}",
            ]
        )


@pytest.mark.parametrize("name", ["unshaped", "ensemble_std"])
def test_a_part_cannot_have_a_name_of_the_combinations_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name}.* cannot be a part"):
        load_config(["reward=[{" + name + ":rule}]", f"run_dir={tmp_path / 'run'}"])
